"""embedding_layer_norm beside eager PyTorch and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import embedding_layer_norm

EPS = 1e-12


def eager(
    word: Tensor,
    types: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    kinds: Tensor,
    places: Tensor,
) -> Tensor:
    summed = F.embedding(ids, word) + F.embedding(kinds, types) + F.embedding(places, position)
    return F.layer_norm(summed, weight.shape, weight, bias, EPS)


def ours(
    word: Tensor,
    types: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    kinds: Tensor,
    places: Tensor,
) -> Tensor:
    return embedding_layer_norm(ids, kinds, places, word, types, position, weight, bias, impl="cpu")


def cases() -> list[Case]:
    functions = {"eager": eager, "torch.compile": torch.compile(eager), "bert_fast cpu": ours}
    found = []
    for tokens, hidden, vocabulary in ((1024, 256, 8192), (1024, 768, 30522)):
        for dtype in (torch.float32, torch.bfloat16):
            tables = [torch.randn(rows, hidden).to(dtype) for rows in (vocabulary, 2, 512)]
            ids = (
                torch.randint(0, vocabulary, (tokens,)),
                torch.randint(0, 2, (tokens,)),
                torch.arange(tokens) % 512,
            )
            inputs = (*tables, torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype), *ids)
            exact = tuple(part.double() if part.is_floating_point() else part for part in inputs)
            dout = torch.randn(tokens, hidden).to(dtype)
            for grad in (None, dout):
                backward = 2 * dout.nbytes + sum(
                    table.nbytes for table in tables
                )  # dout, gathered rows again, tables' gradients
                found.append(
                    Case(
                        f"({tokens}, {hidden}) V {vocabulary} {str(dtype).removeprefix('torch.')} forward"
                        + " + backward" * (grad is not None),
                        {name: forward_and_backward(f, inputs, grad) for name, f in functions.items()},
                        forward_and_backward(eager, exact, None if grad is None else grad.double())(),
                        16 * torch.finfo(dtype).eps,
                        traffic=4 * dout.nbytes + (0 if grad is None else backward),  # three gathered rows and out
                    )
                )
    return found


if __name__ == "__main__":
    main("embedding_layer_norm", cases)
