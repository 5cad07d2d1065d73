"""masked_lm_loss beside the head of transformers' BertForMaskedLM: logits of every token, then cross entropy.

On a GPU hidden is bfloat16 and our parameters float32, as in a model under autocast; the peers get the same values as
bfloat16, and those that compute the masked tokens alone get their rows for nothing, which in a model they wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, forward_and_backward, main
from bert_fast.kernels import masked_lm_loss

EPS = 1e-12
MASKED = 0.15


def head(hidden: Tensor, dense: Tensor, dense_bias: Tensor, weight: Tensor, bias: Tensor, *decoder: Tensor) -> Tensor:
    transformed = F.layer_norm(F.gelu(F.linear(hidden, dense, dense_bias)), weight.shape, weight, bias, EPS)
    return F.linear(transformed, *decoder)


def precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def every_token(*inputs: Tensor) -> Tensor:
    *parameters, labels = inputs
    return F.cross_entropy(head(*parameters).float(), labels)


def masked_tokens(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    rows = (labels >= 0).nonzero().squeeze(1)
    return F.cross_entropy(precise(head(hidden[rows], *parameters)), labels[rows])


def given_rows(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels, rows = inputs
    return F.cross_entropy(precise(head(hidden.index_select(0, rows), *parameters)), labels.index_select(0, rows))


def ours(impl: str, *inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    return masked_lm_loss(hidden, labels, *parameters, eps=EPS, impl=impl).loss


def case(setting: Setting, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, backward: bool) -> Case:
    shapes = ((tokens, hidden), (hidden, hidden), (hidden,), (hidden,), (hidden,), (vocabulary, hidden), (vocabulary,))
    parts = [(setting.randn(*shape) * (1.0 if len(shape) == 1 else 0.05)).to(dtype) for shape in shapes]
    labels = torch.randint(0, vocabulary, (tokens,)).where(torch.rand(tokens) < MASKED, torch.tensor(-100))
    labels = labels.to(setting.device)
    rows = (labels >= 0).nonzero().squeeze(1)
    grad = torch.ones((), device=setting.device) if backward else None
    peers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "every token (transformers)": (every_token, (*parts, labels)),
        "masked tokens, eager": (masked_tokens, (*parts, labels)),
    }
    if setting.on_gpu:
        peers["every token, torch.compile"] = (torch.compile(every_token, dynamic=False), (*parts, labels))
        peers["masked tokens, eager"] = (given_rows, (*parts, labels, rows))
        peers["masked tokens, torch.compile"] = (torch.compile(given_rows, dynamic=False), (*parts, labels, rows))
    mine = (parts[0], *(part.float() if setting.on_gpu else part for part in parts[1:]), labels)
    exact = (*(part.double() for part in parts), labels)
    return Case(
        {
            **{name: forward_and_backward(function, inputs, grad) for name, (function, inputs) in peers.items()},
            **{
                f"bert_fast {impl}": forward_and_backward(partial(ours, impl), mine, grad)
                for impl in setting.ours("masked_lm_loss", dtype)
            },
        },
        forward_and_backward(masked_tokens, exact, None if grad is None else grad.double())(),
        64 * torch.finfo(dtype).eps,
        flops=2 * rows.numel() * hidden * (hidden + vocabulary) * (3 if backward else 1),
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        widths = ((8192, 768), (16384, 1024)) if setting.quick else tuple(product((8192, 16384), (768, 1024)))
        sizes = [(tokens, hidden, 30522, torch.bfloat16) for tokens, hidden in widths]
    else:
        # bfloat16 at the small size alone: on a CPU without bfloat16 units torch's product takes minutes at the other.
        sizes = [(1024, 256, 8192, torch.float32), (1024, 256, 8192, torch.bfloat16)]
        sizes.append((1024, 768, 30522, torch.float32))
    return [
        Plan(
            f"T {tokens} E {hidden} V {vocabulary} {str(dtype).removeprefix('torch.')} forward"
            + " + backward" * backward,
            partial(case, setting, tokens, hidden, vocabulary, dtype, backward),
        )
        for (tokens, hidden, vocabulary, dtype), backward in product(sizes, (False, True))
    ]


if __name__ == "__main__":
    main("masked_lm_loss", plans)
