"""The optimizer's options. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bert_fast._config import check, check_finite, convert_fields

# Numbers that float32, in which the kernels read them, has as finite positive ones.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
_RANGE = f" of float32, {_SMALLEST} to {_LARGEST}"


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights are updated.

    Args:
        name: adamw, or lamb for large batches.
        lr: peak learning rate, reached at the end of the warm-up.
        warmup_steps: steps over which lr rises linearly from 0; a value below 1 is a fraction of all steps.
        decay: linear decays to 0 after the last step; none keeps the peak.
        weight_decay: decoupled weight decay; not applied to biases and LayerNorm weights.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-4
    warmup_steps: float = 0.06
    decay: Literal["linear", "none"] = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self)
        check_finite(self)
        check(_SMALLEST <= self.lr <= _LARGEST, f"lr is {self.lr}; expected a positive number{_RANGE}")
        check(
            self.warmup_steps >= 0 and (self.warmup_steps < 1 or float(self.warmup_steps).is_integer()),
            f"warmup_steps is {self.warmup_steps}; expected whole steps, or a fraction below 1 of all steps",
        )
        check(0 <= self.weight_decay <= _LARGEST, f"weight_decay is {self.weight_decay}; expected 0 or more")
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas is {self.betas}; expected two numbers, each at least 0 and below 1",
        )
        check(_SMALLEST <= self.eps <= _LARGEST, f"eps is {self.eps}; expected a positive number{_RANGE}")
        check(self.max_grad_norm >= 0, f"max_grad_norm is {self.max_grad_norm}; expected 0 (no clipping) or more")
