"""A training step as one CUDA graph: recorded once, then started by one call of the host's.

A graph runs the same kernels on the same addresses each time. So what changes from step to step (tokens, weights of the
losses, the dropout's states, the learning rate) is written before a replay into tensors that stay, and all that lasts
(weights, moments, sums, verdicts) is updated in place. A step of one micro-batch is one graph; of more, one graph is
replayed for each of them and another makes the update. The first steps are run as they are, on the stream on which the
recording follows: they compile kernels and make the optimizer's state. They are steps like all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bert_fast.data import PackedBatch
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.models import BertConfig
from bert_fast.pretrain.micro_batches import StepBatches
from bert_fast.pretrain.passes import dropout_states
from bert_fast.pretrain.step import Inputs, StepWork
from bert_fast.runtime.ranks import Ranks

WARM_UPS = 3
OPS_OF_A_STEP = ("attention", "bias_gelu", "add_layer_norm", "embedding_layer_norm", "masked_lm_loss")


class Capture(Protocol):
    """How a function of no arguments is recorded."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run it as it is, in the place where it will be recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does again, on the same tensors, what `function` does; recording does not do it."""


class CudaCapture:
    """Records CUDA graphs, which share their memory: nothing of one is needed by the next."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # Of optimizers that could be captured and are not, this time.
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Raises ValueError where the function does what a graph can't, as reading a value on the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Batches are pinned by another thread meanwhile, which only this mode allows.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graph: the step can't be recorded ({str(error).splitlines()[0]}); set cuda_graph to false"
            ) from error
        return graph.replay


def capture_on(ranks: Ranks, precision: str) -> CudaCapture:
    """How steps are recorded here.

    Raises:
        ValueError: they can't be: there are several ranks or no CUDA device, or an op would run its reference, which
            waits for the device.
    """
    if ranks.world > 1:
        raise ValueError(
            f"cuda_graph is on and there are {ranks.world} ranks, whose exchange of gradients is in no graph; set it "
            "to false, or train on one"
        )
    if ranks.device.type != "cuda":
        raise ValueError(f"cuda_graph is on and the device is {ranks.device}; set it to false, or device to cuda")
    if waiting := synchronizing_ops(ranks.device, precision):
        raise ValueError(
            f"cuda_graph is on and {', '.join(waiting)} would run the reference here, which waits for the device; "
            "`bert-fast verify --record` lets the kernels be chosen, `bert-fast info` says what is missing"
        )
    return CudaCapture(ranks.device)


def synchronizing_ops(device: torch.device, precision: str) -> list[str]:
    """The ops of a step that would run their reference on `device`."""
    x = torch.empty(0, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    ops = {name: OPS[name] for name in OPS_OF_A_STEP}
    return [name for name, op in ops.items() if op.select("auto", x) is op.impls["reference"].call]


class GraphedStep:
    """Steps whose device part is replayed; each leaves the same bits as `StepWork` called directly.

    Args:
        work: the step; with `keep_gradients` where a step has more than one micro-batch.
        config: of the model, for its dropout.
        seed: of the run.
        capture: records.
    """

    def __init__(self, work: StepWork, config: BertConfig, seed: int, capture: Capture) -> None:
        self._work, self._config, self._seed, self._capture = work, config, seed, capture
        self._micro: dict[tuple[Any, ...], _MicroStep] = {}
        self._update = _Part(work.update, capture)

    def run(self, taken: StepBatches, weights: Tensor, step: int) -> None:
        """Step number `step`; `weights` float32 (M, 2), a row for each of its micro-batches."""
        alone = len(taken.micro) == 1
        for micro, weight in zip(taken.micro, weights.unbind(), strict=True):
            states = dropout_states(self._config, self._work.device, self._seed, step, micro.number)
            # Batches of an unusual shape, with more sequences than it has space for, get a graph of their own.
            key = (alone, micro.batch.max_seqlen, *(x.shape for x in _tensors(micro.batch).values()))
            if key not in self._micro:
                self._micro[key] = _MicroStep(self._work, self._capture, micro.batch, weight, states, alone=alone)
            self._micro[key].run(micro.batch, weight, states)
        if not alone:
            self._update.run()


class _Part:
    """A part of a step: run as it is at first, then recorded and replayed."""

    def __init__(self, function: Callable[[], None], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._left = WARM_UPS
        self._replay: Callable[[], None] | None = None

    def run(self) -> None:
        if self._left:
            self._left -= 1
            self._capture.warm_up(self._function)
            return
        if self._replay is None:
            self._replay = self._capture.record(self._function)
        self._replay()


class _MicroStep:
    """The part of a step that takes a micro-batch of one shape, with the tensors that it is read from."""

    def __init__(
        self,
        work: StepWork,
        capture: Capture,
        batch: PackedBatch,
        weights: Tensor,
        rng_states: Tensor | None,
        *,
        alone: bool,
    ) -> None:
        places: dict[str, Any] = {name: torch.empty_like(x, device=work.device) for name, x in _tensors(batch).items()}
        states = None if rng_states is None else torch.empty_like(rng_states)
        self._inputs = Inputs(replace(batch, **places), torch.empty_like(weights), states)
        self._work = work
        self._part = _Part(self._whole if alone else self._accumulate, capture)

    def run(self, batch: PackedBatch, weights: Tensor, rng_states: Tensor | None) -> None:
        """Write the values to their places and run."""
        for name, place in _tensors(self._inputs.batch).items():
            place.copy_(getattr(batch, name), non_blocking=True)
        self._inputs.weights.copy_(weights)
        if rng_states is not None and self._inputs.rng_states is not None:
            self._inputs.rng_states.copy_(rng_states)
        self._part.run()

    def _accumulate(self) -> None:
        self._work.accumulate(self._inputs)

    def _whole(self) -> None:
        self._work.accumulate(self._inputs)
        self._work.update()


def _tensors(batch: PackedBatch) -> dict[str, Tensor]:
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
