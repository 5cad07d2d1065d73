"""Two ranks of DistributedDataParallel on the CPU: prints "equal" where each gradient is the mean of the ranks' own.

Arguments: the implementation that every op uses, and whose model: "own", or transformers' one, "fused". The gradients
that a fused model should have are those of the same model before it was fused.
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
    """Two sequences of lengths that differ from rank to rank."""
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


def made(whose: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model that is trained, and the one that says which gradients it should have."""
    torch.manual_seed(0)
    if whose == "own":
        model = BertForPreTraining(BertConfig.size("tiny", **SIZES)).train()
        return model, model
    import transformers

    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES)).double().train()
    return bert_fast.fuse(copy.deepcopy(theirs)), theirs


def main() -> None:
    dist.init_process_group("gloo")
    model, expected = made(sys.argv[2])
    with use_impl(sys.argv[1]):
        own = [gradients(expected, rank) for rank in range(dist.get_world_size())]
        # The pooler and NSP head take part in every step, so no parameter is left without a gradient.
        shared = gradients(DistributedDataParallel(model), dist.get_rank())
    mean = {name: torch.stack([grads[name] for grads in own]).mean(0) for name in own[0]}
    assert shared.keys() == mean.keys()
    assert all(grad.abs().max() > 0 for name, grad in mean.items() if name.endswith("weight"))
    for name, grad in shared.items():
        torch.testing.assert_close(grad, mean[name], rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
