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
        capturable: a step waits for nothing and counts on the device, so that a CUDA graph can capture it, after one
            ordinary step; the gradients must stay in their memory (`zero_grad(set_to_none=False)`). `lr` has to be a
            () tensor, on the device, for a change of it to reach the replays. Works without a GPU too.
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
        capturable: bool = False,
        impl: str = "auto",
    ) -> None:
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr is {lr}; expected 0 or more")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm
        self.capturable = capturable
        self.impl = impl
        self.last_grad_norm: Tensor | None = None
        # A () tensor that is 1 leaves the update out: `found_inf`, as for torch's optimizers, or, where there is a
        # max_grad_norm, what `refuses` says when asked with the norm of all gradients.
        self.found_inf: Tensor | None = None
        self.refuses: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure`, called first where given, returned.

        To leave an update out, the host waits for the verdict; where the optimizer is capturable it does not, and
        weights and moments are copied before and put back on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: float | Tensor = 1.0
        refused = self.found_inf
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if self.max_grad_norm is not None and grads:
            self.last_grad_norm, grad_scale = clip_scale(grads, self.max_grad_norm, impl=self.impl)
            if self.refuses is not None:
                refused = self.refuses(self.last_grad_norm)
        if refused is not None and not self.capturable and bool(refused):
            return loss
        for group in self.param_groups:
            counts: dict[torch.device, Tensor] = {}
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self._begin(param, counts)
        before = self._copies() if refused is not None and self.capturable else []
        for group in self.param_groups:
            self._step_group(group, grad_scale)
        for place, value in before:
            assert refused is not None
            place.copy_(torch.where(refused.to(place.device) > 0, value, place))
        return loss

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        """Everything that a step writes, each with a copy."""
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        written = {id(x): x for param in params for x in (param, *self.state[param].values())}
        return [(x, x.detach().clone()) for x in written.values()]

    def _step_group(self, group: dict[str, Any], grad_scale: float | Tensor) -> None:
        # One multi-tensor call takes parameters on one device that have seen the same number of steps.
        params = [param for param in group["params"] if param.grad is not None]
        for together in self._counted_on_device(group, params) if self.capturable else self._counted(params):
            device = together[0].device
            lamb_step(
                together,
                [param.grad for param in together if param.grad is not None],
                [self.state[param]["exp_avg"] for param in together],
                [self.state[param]["exp_avg_sq"] for param in together],
                step=self.state[together[0]]["step"],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale,
                impl=self.impl,
            )

    def _begin(self, param: Tensor, counts: dict[torch.device, Tensor]) -> None:
        """The state before the first step; `counts`: the steps on each device of those who begin together."""
        moment_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        step = counts.setdefault(param.device, torch.zeros((), device=param.device)) if self.capturable else 0
        self.state[param]["step"] = step
        self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype)
        self.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype)

    def _counted(self, params: list[Tensor]) -> list[list[Tensor]]:
        """One step more for each of `params`; those that are on one device and at the same step together."""
        found: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        for param in params:
            self.state[param]["step"] += 1
            found[param.device, self.state[param]["step"]].append(param)
        return list(found.values())

    def _counted_on_device(self, group: dict[str, Any], params: list[Tensor]) -> list[list[Tensor]]:
        """The same where the counts are tensors, which can't be compared without waiting for the device.

        Parameters that began together and got every gradient together share one; where some of them have no gradient
        this time, those that have one go on with a count of their own.
        """
        sharing: dict[int, list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if self.state.get(param):
                sharing[id(self.state[param]["step"])].append(param)
        found: dict[int, list[Tensor]] = defaultdict(list)
        for param in params:
            found[id(self.state[param]["step"])].append(param)
        for key, together in found.items():
            count = self.state[together[0]]["step"]
            if len(together) < len(sharing[key]):
                count = count.clone()
                for param in together:
                    self.state[param]["step"] = count
            count += 1
        return list(found.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and moments of `state_dict()`; the moments keep the dtype in which they were saved.

        The state of an optimizer that is capturable goes into one that is not, and the other way round.
        """
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype, which would round moments kept in float32.
        saved_ids = (index for group in state_dict["param_groups"] for index in group["params"])
        own = (param for group in self.param_groups for param in group["params"])
        for index, param in zip(saved_ids, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().clone().to(param.device)
        for group in self.param_groups:
            shared: dict[tuple[torch.device, int], Tensor] = {}
            for param in group["params"]:
                if state := self.state.get(param):
                    step = int(state["step"])
                    count = torch.full((), float(step), device=param.device)
                    state["step"] = shared.setdefault((param.device, step), count) if self.capturable else step
