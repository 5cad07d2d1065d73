"""Two ranks of DistributedDataParallel on the CPU: prints "equal" where each gradient is the mean of the ranks' own.

Arguments: the implementation that every room uses.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bert_fast import BertConfig, BertForPreTraining
from bert_fast.kernels import use_impl

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def batch(rank: int) -> dict[str, Tensor]:
    """Two sequences of lengths that differ from rank to rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 40, (2, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9 - rank], [4 + rank]])).long()
    labels = torch.where(torch.rand(2, 9, generator=generator) < 0.4, ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1]),
    }


def gradients(model: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch(rank)).loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = BertConfig.size("tiny", vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    model = BertForPreTraining(config).train()
    with use_impl(sys.argv[1]):
        own = [gradients(model, rank) for rank in range(dist.get_world_size())]
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
