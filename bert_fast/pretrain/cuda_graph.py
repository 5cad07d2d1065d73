"""A training step as a CUDA graph: captured once, then replayed with one launch.

A graph runs the same kernels on the same addresses each time. The inputs of a step (tokens, weights of the losses,
dropout states, learning rate) are therefore copied into static tensors before a replay, and its outputs (weights,
moments, sums, verdicts) are updated in place. A step of one micro-batch is one graph; for more micro-batches, one graph
is replayed for each of them and another graph makes the update. The first steps run eagerly on the capture stream: they
compile kernels and create the optimizer's state, and train like all others.
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
from bert_fast.pretrain.micro_batches import StepBatches, dropout_states
from bert_fast.pretrain.step import Inputs, TrainStep
from bert_fast.runtime.ranks import Ranks

WARM_UPS = 3
# linear is cuBLAS in every implementation, and a packed batch needs no padding: neither can synchronize.
OPS_OF_A_STEP = ("attention", "bias_gelu", "add_layer_norm", "embedding_layer_norm", "masked_lm_loss")


class Capture(Protocol):
    """Captures functions without arguments."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run `function` eagerly where it will be captured."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture `function` without running it; returns its replay on the same tensors."""


class CudaCapture:
    """Captures CUDA graphs in one shared memory pool: no graph needs the temporaries of another."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run `function` eagerly on the capture stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # The optimizer warns when a capturable step is not captured.
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture `function` as a CUDA graph; returns its replay.

        Raises:
            ValueError: the function does what a graph can't, such as reading a value on the host.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread pins batches meanwhile, which only this mode allows.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graph: the step can't be captured ({str(error).splitlines()[0]}); set cuda_graph to false"
            ) from error
        return graph.replay


def capture_on(ranks: Ranks, precision: str) -> CudaCapture:
    """The capture of steps on the device of `ranks`.

    Raises:
        ValueError: there are several ranks or no CUDA device, or an op would run its reference, which synchronizes with
            the device.
    """
    if ranks.world_size > 1:
        raise ValueError(
            f"cuda_graph is on and there are {ranks.world_size} ranks, whose collectives can't be captured; set it to "
            "false, or train on one rank"
        )
    if ranks.device.type != "cuda":
        raise ValueError(f"cuda_graph is on and the device is {ranks.device}; set it to false, or device to cuda")
    if names := synchronizing_ops(ranks.device, precision):
        raise ValueError(
            f"cuda_graph is on and {', '.join(names)} would run the reference, which synchronizes with the device; "
            "run `bert-fast verify --record` to enable the kernels, `bert-fast info` shows why they are unavailable"
        )
    return CudaCapture(ranks.device)


def synchronizing_ops(device: torch.device, precision: str) -> list[str]:
    """The ops of a step that would run their reference on `device`, and so synchronize with it."""
    x = torch.empty(0, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    ops = {name: OPS[name] for name in OPS_OF_A_STEP}
    return [name for name, op in ops.items() if op.select("auto", x) is op.impls["reference"].call]


class GraphedStep:
    """A `TrainStep` that is captured and replayed, with the same bits as when it is called directly.

    Args:
        train_step: with `keep_gradients` if a step has more than one micro-batch.
        config: of the model, for its dropout.
        seed: of the run.
        capture: captures the functions of the step.
    """

    def __init__(self, train_step: TrainStep, config: BertConfig, seed: int, capture: Capture) -> None:
        self._train_step, self._config, self._seed, self._capture = train_step, config, seed, capture
        self._graphs: dict[tuple[Any, ...], _MicroBatchGraph] = {}
        self._update = _Graph(train_step.update, capture)

    def run(self, batches: StepBatches, weights: Tensor, step: int) -> None:
        """Run step number `step`; `weights` float32 (M, 2) has a row for each of its micro-batches."""
        single = len(batches.micro) == 1
        for micro, weight in zip(batches.micro, weights.unbind(), strict=True):
            states = dropout_states(self._config, self._train_step.device, self._seed, step, micro.number)
            # A batch with more sequences or labels than the static shape holds gets a graph of its own.
            key = (single, micro.batch.max_seqlen, *(x.shape for x in _tensors(micro.batch).values()))
            if key not in self._graphs:
                inputs = _static_inputs(micro.batch, weight, states, self._train_step.device)
                self._graphs[key] = _MicroBatchGraph(self._train_step, self._capture, inputs, update=single)
            self._graphs[key].run(micro.batch, weight, states)
        if not single:
            self._update.run()


class _Graph:
    """A function that runs eagerly at first, then is captured and replayed."""

    def __init__(self, function: Callable[[], None], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._remaining_warm_ups = WARM_UPS
        self._replay: Callable[[], None] | None = None

    def run(self) -> None:
        if self._remaining_warm_ups:
            self._remaining_warm_ups -= 1
            self._capture.warm_up(self._function)
            return
        if self._replay is None:
            self._replay = self._capture.capture(self._function)
        self._replay()


class _MicroBatchGraph:
    """The graph of a micro-batch of one shape, with the static `inputs` that it reads; with `update`, of a step."""

    def __init__(self, train_step: TrainStep, capture: Capture, inputs: Inputs, *, update: bool) -> None:
        self._train_step, self._inputs = train_step, inputs
        self._graph = _Graph(self._accumulate_and_update if update else self._accumulate, capture)

    def run(self, batch: PackedBatch, weights: Tensor, rng_states: Tensor | None) -> None:
        """Copy the arguments into the static inputs and run."""
        for name, static in _tensors(self._inputs.batch).items():
            static.copy_(getattr(batch, name), non_blocking=True)
        self._inputs.weights.copy_(weights)
        if rng_states is not None and self._inputs.rng_states is not None:
            self._inputs.rng_states.copy_(rng_states)
        self._graph.run()

    def _accumulate(self) -> None:
        self._train_step.accumulate(self._inputs)

    def _accumulate_and_update(self) -> None:
        self._train_step.accumulate(self._inputs)
        self._train_step.update()


def _static_inputs(batch: PackedBatch, weights: Tensor, rng_states: Tensor | None, device: torch.device) -> Inputs:
    """Uninitialized inputs on `device` with the shapes of the arguments."""
    tensors: dict[str, Any] = {name: torch.empty_like(x, device=device) for name, x in _tensors(batch).items()}
    states = None if rng_states is None else torch.empty_like(rng_states)
    return Inputs(replace(batch, **tensors), torch.empty_like(weights), states)


def _tensors(batch: PackedBatch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
