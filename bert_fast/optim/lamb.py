"""LAMB as a torch.optim optimizer over `bert_fast.kernels.lamb_step`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels import clip_scale, lamb_step


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam with decoupled weight decay, the update of each tensor scaled by the trust ratio |w| / |update|.

    The trust ratio applies to every parameter. To exclude a parameter from weight decay (usually biases and LayerNorm
    weights), put it in a group with `weight_decay=0`. The moments are float32 (float64 for float64 parameters) whatever
    the dtype of the parameters, also after `load_state_dict`, so that a resumed run computes the same bits.

    Args:
        params: tensors, or parameter groups; a group may set its own `lr`, `betas`, `eps` and `weight_decay`.
        lr: learning rate; a float, or a () tensor.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: coefficient of the decoupled weight decay.
        max_grad_norm: clip the global gradient norm over all groups to this, without writing the gradients; None for no
            clipping. The norm before clipping is stored in `last_grad_norm`, a () tensor.
        capturable: keep the step counts on the device and never synchronize, so that a CUDA graph can capture a step,
            after one ordinary step. The gradients must stay in their memory (`zero_grad(set_to_none=False)`), and `lr`
            must be a () tensor on the device for replays to see changes of it. Works on the CPU too.
        impl: the implementation of `bert_fast.kernels.lamb_step`.

    Raises:
        ValueError: an option is out of range, infinite or NaN, also in a parameter group.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020.
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
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; expected a number above 0, or None")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm
        self.capturable = capturable
        self.impl = impl
        self.last_grad_norm: Tensor | None = None
        # A () tensor that is 1 skips the update: `found_inf`, as for torch's optimizers, or, with a max_grad_norm, what
        # `skip_if` returns for the norm of all gradients.
        self.found_inf: Tensor | None = None
        self.skip_if: Callable[[Tensor], Tensor] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; ValueError if one of its options is out of range."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            value = group[name]
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a finite number, 0 or more")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas is {group['betas']}; expected two numbers, each at least 0 and below 1")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        To skip an update, the host reads the flag; a capturable optimizer does not synchronize, but copies parameters
        and moments before the update and restores them on the device.

        Args:
            closure: called first, with gradients enabled.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: float | Tensor = 1.0
        skip = self.found_inf
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if self.max_grad_norm is not None and grads:
            self.last_grad_norm, grad_scale = clip_scale(grads, self.max_grad_norm, impl=self.impl)
            if self.skip_if is not None:
                skip = self.skip_if(self.last_grad_norm)
        if skip is not None and not self.capturable and bool(skip):
            return loss
        for group in self.param_groups:
            counts: dict[torch.device, Tensor] = {}
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self._init_state(param, counts)
        snapshot = self._snapshot() if skip is not None and self.capturable else []
        for group in self.param_groups:
            self._step_group(group, grad_scale)
        for tensor, value in snapshot:
            assert skip is not None
            tensor.copy_(torch.where(skip.to(tensor.device) > 0, value, tensor))
        return loss

    def _snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """Every tensor that a step writes, with a copy of it."""
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        written = {id(x): x for param in params for x in (param, *self.state[param].values())}
        return [(x, x.detach().clone()) for x in written.values()]

    def _step_group(self, group: dict[str, Any], grad_scale: float | Tensor) -> None:
        # One multi-tensor call takes parameters on one device that have the same step count.
        params = [param for param in group["params"] if param.grad is not None]
        buckets = self._advance_device_counts(group, params) if self.capturable else self._advance_counts(params)
        for bucket in buckets:
            device = bucket[0].device
            lamb_step(
                bucket,
                [param.grad for param in bucket if param.grad is not None],
                [self.state[param]["exp_avg"] for param in bucket],
                [self.state[param]["exp_avg_sq"] for param in bucket],
                step=self.state[bucket[0]]["step"],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale.to(device) if isinstance(grad_scale, Tensor) else grad_scale,
                impl=self.impl,
            )

    def _init_state(self, param: Tensor, counts: dict[torch.device, Tensor]) -> None:
        """Set the state before the first step; `counts` has the step count, per device, that new parameters share."""
        moment_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        step = counts.setdefault(param.device, torch.zeros((), device=param.device)) if self.capturable else 0
        self.state[param]["step"] = step
        self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=moment_dtype)
        self.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=moment_dtype)

    def _advance_counts(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Increment the step count of each of `params`; returns them in buckets of equal device and count."""
        buckets: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        for param in params:
            self.state[param]["step"] += 1
            buckets[param.device, self.state[param]["step"]].append(param)
        return list(buckets.values())

    def _advance_device_counts(self, group: dict[str, Any], params: list[Tensor]) -> list[list[Tensor]]:
        """`_advance_counts` for counts that are tensors, which the host can't compare without synchronizing.

        Parameters that have had a gradient in the same steps share one count tensor. If only some of them have a
        gradient in this step, these get a new count tensor.
        """
        sharing: dict[int, list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if self.state.get(param):
                sharing[id(self.state[param]["step"])].append(param)
        buckets: dict[int, list[Tensor]] = defaultdict(list)
        for param in params:
            buckets[id(self.state[param]["step"])].append(param)
        for key, bucket in buckets.items():
            count = self.state[bucket[0]]["step"]
            if len(bucket) < len(sharing[key]):
                count = count.clone()
                for param in bucket:
                    self.state[param]["step"] = count
            count += 1
        return list(buckets.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; the moments keep the dtype in which they were saved.

        A capturable optimizer loads the state of one that is not, and the reverse.
        """
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype, which would round moments kept in float32.
        saved_ids = (index for group in state_dict["param_groups"] for index in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for index, param in zip(saved_ids, params, strict=True):
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
