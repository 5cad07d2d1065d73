"""The masked-language-model head and loss in eager PyTorch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_lm_loss_reference(
    hidden: Tensor,
    labels: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor,
    eps: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = hidden.dtype
    masked = labels != ignore_index
    count = masked.sum()
    # How many rows are masked is not known while tracing: there every row goes through, and the others weigh nothing.
    if not torch.compiler.is_compiling():
        hidden, labels = hidden[masked], labels[masked]
    x = F.gelu(F.linear(hidden, dense_weight.to(dtype), dense_bias.to(dtype)))
    x = F.layer_norm(x, x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    logits = F.linear(x, decoder_weight.to(dtype), decoder_bias.to(dtype))
    correct = ((logits.argmax(dim=-1) == labels) & (labels != ignore_index)).sum()
    precise = logits if dtype == torch.float64 else logits.float()
    total = F.cross_entropy(
        precise, labels, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        square = precise.logsumexp(dim=-1).square()
        total = total + z_loss * square.masked_fill(labels == ignore_index, 0.0).sum()
    return total / count.clamp(min=1), correct, count
