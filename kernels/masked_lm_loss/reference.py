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
    """Loss of the masked-language-model head, over the rows with labels != ignore_index.

    h = LayerNorm(gelu(hidden dense_weight^T + dense_bias)), logits = h decoder_weight^T + decoder_bias,
    loss = mean over these rows of (1 - s) (lse - logits[label]) + s (lse - mean(logits)) + z lse^2,
    with lse = logsumexp(logits), s = label_smoothing, z = z_loss. These are the arguments, in order, of every
    implementation; the operator `masked_lm_loss_fwd` takes `needs_grad` after them.

    Args:
        hidden: (T, E) floating point; its dtype is that of the computation up to the logits.
        labels: int64 (T,), from 0 to V - 1 or `ignore_index`.
        dense_weight, dense_bias: (E, E) and (E,), cast to the dtype of `hidden`.
        norm_weight, norm_bias: (E,), likewise.
        decoder_weight, decoder_bias: (V, E) and (V,), likewise.
        eps: added to LayerNorm's variance.
        ignore_index: label of the rows without a loss.
        label_smoothing: share of each target that is spread evenly over the vocabulary.
        z_loss: weight of lse^2.

    Returns:
        loss (), float32, or float64 for float64; correct () int64, the rows whose largest logit, the first of equals,
        is the label's; count () int64, the rows with a label. Without any the loss is 0.
    """
    dtype = hidden.dtype
    masked = labels != ignore_index
    count = masked.sum()
    # The number of labelled rows is unknown while tracing: every row is computed, and the others don't contribute.
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
