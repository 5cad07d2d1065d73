"""A captured and replayed step computes the same bits as an eager one.

The `Recorder` is a CPU stand-in for a CUDA graph: a list of operators, run again on the same tensors, without Python. A
step that reads a value on the host, keeps a count in Python or replaces a tensor by another one computes other bits
when it is replayed.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_fast.data import PackedBatch
from bert_fast.kernels import available_impls, use_impl
from bert_fast.kernels._common import checks
from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.models.encoder import draw_rng_states
from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.optimizer import make_optimizer
from bert_fast.pretrain import cuda_graph
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig
from bert_fast.pretrain.cuda_graph import WARM_UPS, Capture
from bert_fast.pretrain.divergence import Guard
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.step import Inputs, TrainStep
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime.ranks import Ranks

Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]
OPS = cuda_graph.OPS_OF_A_STEP
ON_GPU = torch.cuda.is_available() and all(available_impls()[op]["triton"].ok for op in OPS)


class Operators(TorchDispatchMode):
    """Records every operator with its tensors, and the values that it overwrites in tensors from before.

    Attributes:
        calls: the operators.
        overwritten: tensors that existed before, each with its value before an operator wrote to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self._created: set[int | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        kwargs = kwargs or {}
        for name, argument in zip([a.name for a in func._schema.arguments], args, strict=False):
            self._save(func, name, argument)
        for name, argument in kwargs.items():
            self._save(func, name, argument)
        out = func(*args, **kwargs)
        inputs = {memory(x) for x in tree_leaves((args, kwargs))}
        self._created |= {memory(x) for x in tree_leaves(out)} - inputs
        self.calls.append((func, args, kwargs, tree_leaves(out)))
        return out

    def _save(self, func: Any, name: str, argument: Any) -> None:
        schema = next(a for a in func._schema.arguments if a.name == name)
        if schema.alias_info is not None and schema.alias_info.is_write:
            for x in tree_leaves(argument):
                if isinstance(x, Tensor) and memory(x) not in self._created:
                    self.overwritten.append((x, x.detach().clone()))

    def undo(self) -> None:
        """Restore every value that was overwritten."""
        for x, value in reversed(self.overwritten):
            x.detach().copy_(value)


def memory(x: Any) -> int | None:
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else None


class Recorder:
    """A `Capture` on the CPU. What it records is undone: the capture of a CUDA graph runs nothing."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        with Operators() as operators:
            function()
        operators.undo()
        self.recorded += 1
        return lambda: self._replay(operators.calls)

    @torch.no_grad()
    def _replay(self, calls: list[Call]) -> None:
        for func, args, kwargs, outs in calls:
            inputs = {memory(x) for x in tree_leaves((args, kwargs))}
            for static, value in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(static, Tensor) and memory(static) not in inputs:
                    static.copy_(value)


class Plain(Recorder):
    """Replays the Python function itself."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return function


@pytest.fixture(autouse=True)
def no_value_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable the argument checks that read values, which exist for CPU tensors only; compute with one thread."""
    original = checks.values_are_checked
    for module in [m for name, m in sys.modules.items() if name.startswith("bert_fast.")]:
        if getattr(module, "values_are_checked", None) is original:
            monkeypatch.setattr(module, "values_are_checked", lambda x: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path, prepared: Path, tiny_config: Path) -> PretrainConfig:
    return PretrainConfig(
        output_dir=str(tmp_path / "run"),
        data=DataOptions(str(prepared), seq_len=32, token_budget=128),
        model=ModelOptions(config=str(tiny_config)),
        optimizer=OptimizerOptions(lr=1e-3, warmup_steps=4),
        steps=WARM_UPS + 6,
        device="cpu",
        log_interval=1,
        eval_interval=0,
        checkpoint_interval=0,
        static_shapes=True,
        ceiling=False,
        tensorboard=False,
        progress=False,
        prefetch=0,
    )


def quiet(_: str) -> None:
    pass


def recorded(config: PretrainConfig) -> tuple[Trainer, Recorder]:
    """A trainer whose steps are captured by a recorder."""
    # Without compiled kernels ops run the reference, which reads lengths on the host.
    kind = Plain if cuda_graph.synchronizing_ops(torch.device("cpu"), config.precision) else Recorder
    recorder = kind()
    return Trainer(replace(config, cuda_graph=True), quiet, capture=recorder), recorder


def steps(trainer: Trainer, count: int, before: Callable[[Trainer], Any] = lambda trainer: None) -> list[Any]:
    """Verdict, totals with the guard's state, and parameters after each step; `before` is called before each."""
    records = []
    for _ in range(count):
        before(trainer)
        trainer.train_step()
        weights = [p.detach().cpu().clone() for p in trainer.model.parameters()]
        sums = (trainer.totals.tolist(), trainer.guard.state())
        records.append((trainer.device_step.verdict.tolist(), sums, weights))
    return records


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert str(a[0]) == str(b[0]), step  # a loss can be NaN
        assert a[1] == b[1], step
        assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(a[2], b[2], strict=True)), step


# Relative: what other orders of the sums of products may change in a loss or norm over these few steps in float32 or
# bfloat16. Other inputs, masks or learning rates change more than a percent.
ROUNDING = {"fp32": 1e-4, "bf16": 1e-2}


def assert_equal_or_rounded(actual: list[Any], expected: list[Any], rounding: float) -> None:
    """`assert_equal`, but with a warning where losses and norms differ within `rounding`.

    cuBLAS may choose another algorithm on the stream of the capture than on that of the eager steps.
    """
    try:
        assert_equal(actual, expected)
    except AssertionError:
        for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert a[0][0] == b[0][0], step
            assert a[0][1:] == pytest.approx(b[0][1:], rel=rounding), step
        warnings.warn("the replayed steps equal the eager ones within rounding, not to the bit", stacklevel=2)


def test_rounding_of_a_replay_warns_and_other_inputs_fail() -> None:
    def run(loss: float, norm: float = 2.0) -> list[Any]:
        return [([0.0, loss, norm], ([], []), [torch.tensor(loss)])]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_or_rounded(run(3.0), run(3.0), ROUNDING["fp32"])
    with pytest.warns(UserWarning, match="within rounding, not to the bit"):
        assert_equal_or_rounded(run(3.0 + 1e-6), run(3.0), ROUNDING["fp32"])
    with pytest.raises(AssertionError):
        assert_equal_or_rounded(run(3.1), run(3.0), ROUNDING["bf16"])
    with pytest.raises(AssertionError):
        assert_equal_or_rounded(run(3.0, norm=2.1), run(3.0), ROUNDING["bf16"])


CHANGES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "accumulation": {"accumulation": 3},
    "bf16, recomputed": {"precision": "bf16", "recompute": True},
    "lamb, clipped": {"optimizer": OptimizerOptions(name="lamb", lr=1e-2, warmup_steps=4)},
    "lamb, unclipped, accumulation": {
        "optimizer": OptimizerOptions(name="lamb", lr=1e-2, max_grad_norm=0.0), "accumulation": 2,
    },
    "full last layer, no clipping": {
        "masked_last_layer": False, "optimizer": OptimizerOptions(lr=1e-3, max_grad_norm=0.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_replayed_steps_equal_eager_ones(config: PretrainConfig, changes: dict[str, Any]) -> None:
    """With dropout, a learning-rate schedule, and a different number of masked tokens in each batch."""
    config = replace(config, **changes)
    eager = Trainer(config, quiet)
    masked = {tuple(eager.feed.step(eager.feed.advance(eager.position, 5 * i)).counts[0].tolist()) for i in range(3)}
    assert len(masked) > 1
    assert config.steps is not None
    expected = steps(eager, config.steps)
    trainer, recorder = recorded(config)
    assert_equal(steps(trainer, config.steps), expected)
    assert recorder.recorded == (1 if config.accumulation == 1 else 2)
    assert trainer.lr == eager.lr > 0
    assert len({str(step[0]) for step in expected}) == config.steps


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_replayed_step_with_a_loss_that_is_not_finite_is_skipped(
    config: PretrainConfig, name: Any, max_grad_norm: float
) -> None:
    options = OptimizerOptions(name=name, lr=1e-3, max_grad_norm=max_grad_norm)
    config = replace(config, on_divergence="skip", optimizer=options)

    def spoil(trainer: Trainer) -> None:
        """Put a NaN into the weights for step WARM_UPS + 3 only."""
        bias = trainer.model.cls.predictions.bias.data
        if trainer.step == WARM_UPS + 2:
            original.append(float(bias[7]))
            bias[7] = math.nan
        elif trainer.step == WARM_UPS + 3:
            bias[7] = original[-1]

    original: list[float] = []
    expected = steps(Trainer(config, quiet), WARM_UPS + 5, spoil)
    trainer, recorder = recorded(config)
    actual = steps(trainer, WARM_UPS + 5, spoil)
    assert_equal(actual, expected)
    assert recorder.recorded == 1
    assert [step[0][0] for step in actual] == [0.0] * (WARM_UPS + 2) + [1.0, 0.0, 0.0]
    assert (trainer.guard.skipped, trainer.guard.in_a_row) == (1, 0)
    before, spoilt = actual[WARM_UPS + 1][2], actual[WARM_UPS + 2][2]
    assert sum(not torch.equal(a, b) for a, b in zip(before, spoilt, strict=True)) == 1  # the one with the NaN
    assert (Path(config.output_dir) / "diverged" / f"step-{WARM_UPS + 3:08d}" / "record.json").is_file()


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_run_resumes_with_and_without_capture(config: PretrainConfig, name: Any, tmp_path: Path) -> None:
    config = replace(config, steps=14, optimizer=OptimizerOptions(name=name, lr=1e-3))
    expected = steps(Trainer(replace(config, output_dir=str(tmp_path / "uninterrupted")), quiet), 14)
    first, _ = recorded(config)
    assert_equal(steps(first, 5), expected[:5])
    first.save()
    second, recorder = recorded(config)
    assert second.step == 5
    assert_equal(steps(second, 5), expected[5:10])
    assert recorder.recorded == 1
    second.save()
    assert_equal(steps(Trainer(config, quiet), 4), expected[10:])


def test_a_batch_of_another_shape_gets_its_own_graph(config: PretrainConfig) -> None:
    """Every second batch, from the third on, has more labels than the static shape."""

    def widen(trainer: Trainer) -> None:
        assert trainer.feed.transform is not None
        original = originals.setdefault(id(trainer), trainer.feed.transform)
        wide = trainer.step >= 2 and trainer.step % 2 == 0

        def transform(batch: Any) -> Any:
            batch = original(batch)
            rows = batch.label_rows
            return replace(batch, label_rows=torch.cat([rows, torch.zeros_like(rows)])) if wide else batch

        trainer.feed.transform = transform

    originals: dict[int, Any] = {}
    config = replace(config, steps=14)
    expected = steps(Trainer(config, quiet), 14, widen)
    trainer, recorder = recorded(config)
    assert_equal(steps(trainer, 14, widen), expected)
    assert recorder.recorded == 2


def test_a_run_writes_the_same_model(config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(config, checkpoint_interval=4, eval_interval=4, prefetch=2)
    expected = pretrain(replace(config, output_dir=str(tmp_path / "eager")), quiet)
    capture: Capture = Plain()
    with Ranks("cpu") as ranks:
        actual = Trainer(replace(config, cuda_graph=True), quiet, ranks, capture).run()
    assert actual.metrics == expected.metrics
    models = [Path(result.model_dir) / "model.safetensors" for result in (actual, expected)]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"static_shapes": False}, "cuda_graph is on and static_shapes off; .* set static_shapes to true"),
        ({"parallel": "fsdp"}, "cuda_graph is on and parallel is fsdp"),
        ({}, "cuda_graph is on and the device is cpu; set it to false"),
    ],
    ids=["shapes", "fsdp", "cpu"],
)
def test_configs_that_exclude_a_graph_raise(config: PretrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(replace(config, **{"cuda_graph": True, **changes}), quiet)
    assert not Path(config.output_dir).exists()


def test_several_ranks_raise_and_ops_without_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks("cpu")
    monkeypatch.setattr(ranks, "world_size", 2)
    with pytest.raises(ValueError, match="cuda_graph is on and there are 2 ranks"):
        cuda_graph.capture_on(ranks, "bf16")
    with use_impl("reference"):
        assert cuda_graph.synchronizing_ops(torch.device("cpu"), "bf16") == list(OPS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_triton_kernels_reads_no_value(precision: str, tiny_config: Path) -> None:
    """Fake tensors have no values: reading one, or making a shape from one, raises."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = BertConfig.from_pretrained(tiny_config.parent, vocab_size=120)
    with FakeTensorMode(), use_impl("triton"), device:
        model = BertForPreTraining(settings).train()
        optimizer = make_optimizer(model, OptimizerOptions())
        for group in optimizer.param_groups:
            group |= {"capturable": True, "lr": torch.zeros(())}
        guard, totals = Guard("skip", 3.0, device), Totals(device)
        work = TrainStep(model, optimizer, guard, totals, precision=precision, max_grad_norm=1.0)
        tokens = [torch.zeros(64, dtype=torch.int64) for _ in range(4)]
        ends, pairs = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
        batch = PackedBatch(*tokens[:3], ends, 32, tokens[3], pairs, torch.zeros(12, dtype=torch.int64))
        work.accumulate(Inputs(batch, torch.ones(2), draw_rng_states(settings, device)))
        assert all(p.grad is not None for p in model.parameters())
        work.update()
        with pytest.raises(DataDependentOutputException):
            float(work.verdict[1])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and Triton")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_captured_step_equals_an_eager_one(
    config: PretrainConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, device="cuda", **changes)
    assert config.steps is not None
    with use_impl("triton"):
        expected = steps(Trainer(config, quiet), config.steps)
        trainer = Trainer(replace(config, cuda_graph=True), quiet)
        replays = 0
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph: torch.cuda.CUDAGraph) -> None:
            nonlocal replays
            replays += 1
            replay(graph)

        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
        assert_equal_or_rounded(steps(trainer, config.steps), expected, ROUNDING[config.precision])
    assert replays >= config.steps - WARM_UPS
