"""Public function of masked_lm_loss: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import (
    LARGEST,
    check_eps,
    check_floating,
    check_int,
    check_integer,
    check_number,
    check_same_device,
    check_shape,
    to_compute_dtype,
    values_are_checked,
)
from bert_fast.kernels.masked_lm_loss.op import OP


class MaskedLMLoss(NamedTuple):
    """Mean loss over the labelled rows, the number of them that the largest logit predicts, and their number."""

    loss: Tensor  # () float32
    correct: Tensor  # () int64
    count: Tensor  # type: ignore[assignment]  # () int64; hides tuple.count


def masked_lm_loss(
    hidden: Tensor,
    labels: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor,
    *,
    eps: float = 1e-12,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> MaskedLMLoss:
    """Cross entropy of BERT's masked-language-model head, computed for the rows that have a label.

    h = LayerNorm(gelu(hidden dense_weight^T + dense_bias)), logits = h decoder_weight^T + decoder_bias,
    loss = mean over the labelled rows of
           (1 - s) (lse - logits[label]) + s (lse - mean(logits)) + z lse^2,
    with lse = logsumexp(logits), s = label_smoothing, z = z_loss.

    Args:
        hidden: (T, E) float32, bfloat16, float16 or float64; the encoder's output.
        labels: (T,) int64; the token to predict, or `ignore_index` for rows without a loss.
        dense_weight, dense_bias: (E, E) and (E,), the transform before GeLU (erf) and LayerNorm.
        norm_weight, norm_bias: (E,), LayerNorm's.
        decoder_weight, decoder_bias: (V, E), often the word embedding itself, and (V,).
        eps: added to LayerNorm's variance.
        ignore_index: the label of rows without a loss.
        label_smoothing: share of each target that is spread evenly over the vocabulary, 0 <= s < 1, as in
            torch.nn.functional.cross_entropy.
        z_loss: weight of lse^2, >= 0, which keeps the logits from drifting; PaLM uses 1e-4.
        impl: "auto", "reference", "triton" or "cpu".

        The parameters have the dtype of `hidden` or float32; under autocast the matrix products run in its dtype.

    Returns:
        loss () float32 (float64 for float64 input), the only differentiable output; correct () int64, the rows whose
        largest logit (the first of equals) is the label's; count () int64, the labelled rows. Without labelled rows
        the loss is 0 and every gradient is zero.

    Raises:
        TypeError: a tensor is not floating point, or `labels` is not int64.
        ValueError: a shape or a device does not fit, `label_smoothing` or `z_loss` is out of range, `impl` is none of
            the above, or a label is neither `ignore_index` nor in [0, V). Labels on CUDA are read only under
            BERT_FAST_CHECK=1; otherwise the Triton kernels treat a row with such a label as unlabelled.
        ImplUnavailableError: the requested `impl` does not exist or can't run here.

    Source: Devlin et al., "BERT", 2019, section 3.1 and appendix A.2; label smoothing: Szegedy et al., "Rethinking the
    Inception architecture", 2016, section 7; z-loss: Chowdhery et al., "PaLM", 2022, section 5.
    """
    parameters = {
        "dense_weight": dense_weight,
        "dense_bias": dense_bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "decoder_weight": decoder_weight,
        "decoder_bias": decoder_bias,
    }
    check_floating("hidden", hidden, ("T", "E"))
    check_integer("labels", labels, (torch.int64,))
    check_shape("labels", labels, (hidden.shape[0],))
    check_same_device(hidden, labels=labels)
    width = hidden.shape[1]
    check_floating("dense_weight", dense_weight, (width, width), hidden)
    for name in ("dense_bias", "norm_weight", "norm_bias"):
        check_floating(name, parameters[name], (width,), hidden)
    check_floating("decoder_weight", decoder_weight, ("V", width), hidden)
    check_floating("decoder_bias", decoder_bias, decoder_weight.shape[:1], hidden)
    eps = check_eps(eps)
    check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1, "the label of rows without a loss, an int")
    label_smoothing = check_number(
        "label_smoothing", label_smoothing, 0.0, math.nextafter(1.0, 0.0), "a number from 0 to below 1"
    )
    z_loss = check_number("z_loss", z_loss, 0.0, LARGEST, "a number that is not negative, such as 1e-4")
    _check_labels(labels, decoder_weight.shape[0], ignore_index)
    hidden = to_compute_dtype(hidden)
    call = OP.select(impl, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = call(hidden, labels, *parameters.values(), eps, ignore_index, label_smoothing, z_loss)
        return MaskedLMLoss(*outputs)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if not values_are_checked(labels):
        return
    wrong = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
    if wrong.numel():
        low, high = (int(value) for value in torch.aminmax(wrong))
        raise ValueError(
            f"labels has {wrong.numel()} values outside the vocabulary (from {low} to {high}); "
            f"expected 0 to {vocabulary - 1}, or {ignore_index} for rows without a label"
        )
