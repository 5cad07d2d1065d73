"""LAMB as a torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels import clip_scale, lamb_step


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020): Adam with decoupled weight decay, scaled for each tensor by |w| / |update|.

    Every parameter gets the trust ratio; a parameter is kept from weight decay (biases and LayerNorm, usually) by
    putting it in a group with `weight_decay=0`. The moments are float32 (float64 for float64 parameters), whatever the
    dtype of the parameters, also through `load_state_dict`: a run that is resumed goes on to the bit.

    Args:
        params: tensors, or groups as torch.optim takes them; `lr`, `betas`, `eps` and `weight_decay` may be the
            group's own.
        lr: learning rate; a float, or a () tensor.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: strength of the decoupled decay.
        max_grad_norm: the gradients of all groups are clipped to this global norm, without writing them; None for no
            clipping. The norm before clipping is kept in `last_grad_norm`, a () tensor.
        impl: the implementation of `bert_fast.kernels.lamb_step`.

    Raises:
        ValueError: `lr` or `max_grad_norm` is out of range; the others are checked by `lamb_step` at each step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        impl: str = "auto",
    ) -> None:
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr is {lr}; expected 0 or more")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm
        self.impl = impl
        self.last_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure`, called first where given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: float | Tensor = 1.0
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if self.max_grad_norm is not None and grads:
            self.last_grad_norm, grad_scale = clip_scale(grads, self.max_grad_norm)
        for group in self.param_groups:
            self._step_group(group, grad_scale)
        return loss

    def _step_group(self, group: dict[str, Any], grad_scale: float | Tensor) -> None:
        # One multi-tensor call takes parameters on one device that have seen the same number of steps.
        together: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is not None:
                state = self.state[param]
                if not state:
                    moment_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype)
                state["step"] += 1
                together[param.device, state["step"]].append(param)
        for (device, step), params in together.items():
            lamb_step(
                params,
                [param.grad for param in params if param.grad is not None],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale,
                impl=self.impl,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and moments of `state_dict()`; the moments keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype, which would round moments kept in float32.
        saved_ids = (index for group in state_dict["param_groups"] for index in group["params"])
        own = (param for group in self.param_groups for param in group["params"])
        for index, param in zip(saved_ids, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().clone().to(param.device)
