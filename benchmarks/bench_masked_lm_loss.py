"""masked_lm_loss beside the head of transformers' BertForMaskedLM: logits of every token, then cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import masked_lm_loss

EPS = 1e-12
MASKED = 0.15


def head(hidden: Tensor, dense: Tensor, dense_bias: Tensor, weight: Tensor, bias: Tensor, *decoder: Tensor) -> Tensor:
    transformed = F.layer_norm(F.gelu(F.linear(hidden, dense, dense_bias)), weight.shape, weight, bias, EPS)
    return F.linear(transformed, *decoder)


def every_token(*inputs: Tensor) -> Tensor:
    *parameters, labels = inputs
    return F.cross_entropy(head(*parameters).float(), labels)


def masked_tokens(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    rows = (labels >= 0).nonzero().squeeze(1)
    return F.cross_entropy(head(hidden[rows], *parameters).float(), labels[rows])


def ours(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    return masked_lm_loss(hidden, labels, *parameters, impl="cpu").loss


def truth(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    rows = (labels >= 0).nonzero().squeeze(1)
    return F.cross_entropy(head(hidden[rows], *parameters), labels[rows])


def cases() -> list[Case]:
    functions = {
        "every token (transformers)": every_token,
        "masked tokens, eager": masked_tokens,
        "bert_fast cpu": ours,
    }
    found = []
    # bfloat16 at the small size alone: on a CPU without bfloat16 units torch's product takes minutes at the other.
    sizes = ((1024, 256, 8192, (torch.float32, torch.bfloat16)), (1024, 768, 30522, (torch.float32,)))
    for tokens, hidden, vocabulary, dtypes in sizes:
        for dtype in dtypes:
            shapes = (
                (tokens, hidden),
                (hidden, hidden),
                (hidden,),
                (hidden,),
                (hidden,),
                (vocabulary, hidden),
                (vocabulary,),
            )
            parts = [(torch.randn(shape) * (1.0 if len(shape) == 1 else 0.05)).to(dtype) for shape in shapes]
            labels = torch.randint(0, vocabulary, (tokens,)).where(torch.rand(tokens) < MASKED, torch.tensor(-100))
            count = int((labels >= 0).sum())
            exact = (*(part.double() for part in parts), labels)
            for backward in (False, True):
                grad = torch.tensor(1.0) if backward else None
                found.append(
                    Case(
                        f"T {tokens} E {hidden} V {vocabulary} {str(dtype).removeprefix('torch.')} forward"
                        + " + backward" * backward,
                        {name: forward_and_backward(f, (*parts, labels), grad) for name, f in functions.items()},
                        forward_and_backward(truth, exact, None if grad is None else grad.double())(),
                        64 * torch.finfo(dtype).eps,
                        flops=2 * count * hidden * (hidden + vocabulary) * (3 if backward else 1),
                    )
                )
    return found


if __name__ == "__main__":
    main("masked_lm_loss", cases)
