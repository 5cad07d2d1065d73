"""Two ranks of DistributedDataParallel on the CPU: prints "equal" if every gradient is the mean over the ranks.

Arguments: the implementation that every op uses, and the model: "bert_fast", or "fused" for transformers' model after
`fuse`. The expected gradients of a fused model are those of the same model before `fuse`.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import bert_fast
from bert_fast import BertConfig, BertForPreTraining
from bert_fast.cli.main import end_rank
from bert_fast.kernels import use_impl

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def batch(rank: int) -> dict[str, Tensor]:
    """Two sequences whose lengths depend on the rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 40, (2, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9 - rank], [4 + rank]])).long()
    chosen = (torch.rand(2, 9, generator=generator) < 0.4) & mask.bool()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(chosen, ids, -100),
        "next_sentence_label": torch.tensor([0, 1]),
    }


def gradients(model: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch(rank)).loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def models(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model to train, and the one with the expected gradients."""
    torch.manual_seed(0)
    if kind == "bert_fast":
        model = BertForPreTraining(BertConfig.size("tiny", **SIZES)).train()
        return model, model
    import transformers

    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES)).double().train()
    return bert_fast.fuse(copy.deepcopy(theirs)), theirs


def main() -> None:
    dist.init_process_group("gloo")
    model, expected = models(sys.argv[2])
    with use_impl(sys.argv[1]):
        by_rank = [gradients(expected, rank) for rank in range(dist.get_world_size())]
        # Every step uses the pooler and the NSP head, so every parameter has a gradient.
        shared = gradients(DistributedDataParallel(model), dist.get_rank())
    mean = {name: torch.stack([grads[name] for grads in by_rank]).mean(0) for name in by_rank[0]}
    assert shared.keys() == mean.keys()
    assert all(grad.abs().max() > 0 for name, grad in mean.items() if name.endswith("weight"))
    for name, grad in shared.items():
        # float32: one sum of two ranks, rounded by half an eps (6e-8), and exact halves; fused models are in float64.
        torch.testing.assert_close(grad, mean[name], rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end_rank(0)
