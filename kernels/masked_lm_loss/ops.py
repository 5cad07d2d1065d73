"""Operators of masked_lm_loss: schema, fake, gradient. The kernels register themselves for the dispatch keys."""

from __future__ import annotations

from bert_fast.kernels._common.dispatch import Implementation, Room
from bert_fast.kernels.masked_lm_loss.reference import masked_lm_loss_reference

ROOM = Room(
    "masked_lm_loss",
    {"reference": Implementation(masked_lm_loss_reference, None, None)},
    choices=(),
)
