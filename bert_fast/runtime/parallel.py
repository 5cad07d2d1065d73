"""Data parallelism over the ranks: replicated (DistributedDataParallel) or sharded (FSDP2).

Both average the gradients over the ranks, so a rank's loss is its share of the step's loss times the number of ranks.
"""

# Annotations are evaluated here: DistributedDataParallel checks the type in the signature of a communication hook.
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from bert_fast.models import BertForPreTraining
from bert_fast.runtime.ranks import Ranks


class Parallel:
    """A model wrapped for training on all ranks.

    Args:
        model: the full model, equal on every rank, on its device. FSDP shards its parameters in place.
        ranks: with one rank, `model` itself is trained.
        strategy: "ddp" or "fsdp".
        gradient_communication: "fp32" or "bf16", the dtype in which gradients are reduced.

    Attributes:
        model: has the parameters.
        forward: the module to call in training.
        sharded: whether the parameters are DTensors.
    """

    def __init__(self, model: BertForPreTraining, ranks: Ranks, *, strategy: str, gradient_communication: str) -> None:
        self.model, self._main = model, ranks.main
        self.forward: Any = model
        self.sharded = strategy == "fsdp" and ranks.world_size > 1
        bf16_gradients = gradient_communication == "bf16"
        if self.sharded:
            _shard(model, ranks, bf16_gradients=bf16_gradients)
        elif ranks.world_size > 1:
            self.forward = _replicate(model, ranks, bf16_gradients=bf16_gradients)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward: gradients are reduced only in a step's `last` one."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)
            yield
        elif self.forward is self.model or last:
            yield
        else:
            with self.forward.no_sync():
                yield

    def full_state_dict(self) -> dict[str, Tensor]:
        """The full parameters on the CPU on rank 0, {} on the others. A collective: every rank must call it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return state

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in transformers' format, on rank 0. A collective if the model is sharded."""
        if not self.sharded:
            if self._main:
                self.model.save_pretrained(folder)
            return
        state = self.full_state_dict()
        if self._main:
            with torch.device("meta"):
                full_model = BertForPreTraining(self.model.config)
            full_model.load_state_dict(state, assign=True)
            full_model.tie_weights()
            full_model.save_pretrained(folder)


def _replicate(model: nn.Module, ranks: Ranks, *, bf16_gradients: bool) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    devices = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if bf16_gradients:
        wrapped.register_comm_hook(None, _bf16_hook)
    return wrapped


def _bf16_hook(state: None, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's hook under another name: by its own, DistributedDataParallel rejects it for gloo, which supports it."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(state, bucket)  # type: ignore[arg-type] # None is all ranks


def _shard(model: BertForPreTraining, ranks: Ranks, *, bf16_gradients: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16_gradients else None)
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
