"""One model on several ranks: whole on each (DistributedDataParallel), or its tensors in shards (FSDP2).

Both average the ranks' gradients, so a rank's loss is its share of the step's loss times the number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from bert_fast.models import BertForPreTraining
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.runtime.ranks import Ranks


class Parallel:
    """The model as the ranks train it together.

    Args:
        model: the whole model, the same on every rank, on its device. FSDP shards its parameters in place.
        config: `parallel` and `gradient_communication`.
        ranks: who takes part; one rank alone trains `model` itself.

    Attributes:
        model: what has the parameters.
        forward: what is called in training.
        sharded: whether the parameters are DTensors.
    """

    def __init__(self, model: BertForPreTraining, config: PretrainConfig, ranks: Ranks) -> None:
        self.model = model
        self.forward: Any = model
        self.sharded = config.parallel == "fsdp" and ranks.world > 1
        if self.sharded:
            _shard(model, config, ranks)
        elif ranks.world > 1:
            self.forward = _replicate(model, config, ranks)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged with the step's last one only."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)
            yield
        elif self.forward is self.model or last:
            yield
        else:
            with self.forward.no_sync():
                yield

    def whole_state(self) -> dict[str, Tensor]:
        """Every parameter whole, on the CPU; on rank 0, elsewhere nothing. Every rank has to call it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return state

    def save_pretrained(self, folder: Path, *, main: bool) -> None:
        """Rank 0 writes the model in transformers' format; with shards every rank has to call it."""
        if not self.sharded:
            if main:
                self.model.save_pretrained(folder)
            return
        state = self.whole_state()
        if main:
            with torch.device("meta"):
                whole = BertForPreTraining(self.model.config)
            whole.load_state_dict(state, assign=True)
            whole.tie_weights()
            whole.save_pretrained(folder)


def _replicate(model: nn.Module, config: PretrainConfig, ranks: Ranks) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    devices = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if config.gradient_communication == "bf16":
        wrapped.register_comm_hook(None, _as_bf16)
    return wrapped


def _as_bf16(state: None, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's hook; under its own name DistributedDataParallel refuses it with gloo, which can do it too."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(state, bucket)  # type: ignore[arg-type] # None is all ranks


def _shard(model: BertForPreTraining, config: PretrainConfig, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    reduce = torch.bfloat16 if config.gradient_communication == "bf16" else None
    policy = MixedPrecisionPolicy(reduce_dtype=reduce)
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
