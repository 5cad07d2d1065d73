"""Settings that make a step cheaper do not change its loss and gradient; throughput in the log; traces."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import use_impl
from bert_fast.kernels._common import checks
from bert_fast.models import BertConfig
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig
from bert_fast.pretrain.metrics import Meter, gemm_ceiling, model_flops
from bert_fast.pretrain.micro_batches import Position, StepBatches
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime.log import read_log


@pytest.fixture
def config(tmp_path: Path, prepared: Path, tiny_config: Path) -> PretrainConfig:
    return PretrainConfig(
        output_dir=str(tmp_path / "run"),
        data=DataOptions(str(prepared), seq_len=32, token_budget=200),
        model=ModelOptions(config=str(tiny_config), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        optimizer=OptimizerOptions(lr=1e-3),
        steps=3,
        accumulation=2,
        log_interval=1,
        eval_interval=0,
        checkpoint_interval=0,
        masked_last_layer=False,
        ceiling=False,
        tensorboard=False,
        progress=False,
        prefetch=0,
    )


def gradients(config: PretrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The totals and the gradient of the first step."""
    trainer = Trainer(config, lambda text: None)
    by_name: dict[str, torch.Tensor] = {}
    original = trainer._update

    def update(*arguments: Any) -> Any:
        by_name.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        return original(*arguments)

    trainer._update = update  # type: ignore[method-assign]
    trainer.train_step()
    return trainer.totals.tolist(), by_name


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": True},
        {"masked_last_layer": True},
        {"static_shapes": True},
        {"recompute": True, "masked_last_layer": True, "static_shapes": True},
        {"masked_last_layer": True, "static_shapes": True, "precision": "bf16"},
    ],
    ids=["recompute", "masked last layer", "static shapes", "all", "bf16"],
)
def test_a_step_has_the_same_loss_and_gradient(config: PretrainConfig, changes: dict[str, Any]) -> None:
    plain = replace(config, precision=changes.get("precision", "fp32"))
    sums, expected = gradients(plain)
    actual_sums, actual = gradients(replace(config, **changes))
    bf16 = plain.precision == "bf16"
    # fp32: sums over different numbers of rows. bf16: gradients are rounded to 8 bits of mantissa on the way.
    assert actual_sums == pytest.approx(sums, rel=4e-3 if bf16 else 1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        error = (actual[name] - gradient).abs().max().item()
        assert error <= (0.04 if bf16 else 1e-5) * scale + 1e-7, (name, error, scale)
    if changes == {"recompute": True}:
        assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_recomputation_repeats_the_dropout(config: PretrainConfig) -> None:
    config = replace(config, model=replace(config.model, hidden_dropout_prob=0.1), masked_last_layer=True)
    sums, expected = gradients(config)
    recomputed_sums, actual = gradients(replace(config, recompute=True))
    assert recomputed_sums == sums
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_static_batches_have_one_shape(config: PretrainConfig) -> None:
    trainer = Trainer(replace(config, static_shapes=True, masked_last_layer=True), lambda text: None)
    shapes, position = set(), Position(0, 0)
    for _ in range(8):
        batches = trainer.feed.step(position)
        position = batches.end
        for micro in batches.micro:
            batch = micro.batch
            assert batch.label_rows is not None
            rows = set(batch.label_rows.tolist())
            assert set((batch.labels != -100).nonzero()[:, 0].tolist()) == rows - {0}
            shapes.add((batch.num_tokens, batch.num_sequences, len(batch.label_rows), batch.max_seqlen))
            assert int(batch.cu_seqlens[-1]) == batch.num_tokens
            assert int(batch.cu_seqlens.diff().max()) <= 32
    assert len(shapes) == 1
    assert next(iter(shapes))[0] == 200


class Reads(TorchDispatchMode):
    """Counts the operators that read a tensor's value on the host, which synchronizes with a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_value_on_the_host(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for what is read from CPU tensors only: argument checks, and the guard's verdict."""
    trainer = Trainer(config, lambda text: None)
    trainer.train_step()
    original = checks.values_are_checked
    for module in [m for name, m in sys.modules.items() if name.startswith("bert_fast.")]:
        if getattr(module, "values_are_checked", None) is original:
            monkeypatch.setattr(module, "values_are_checked", lambda x: False)
    monkeypatch.setattr(trainer.guard, "drain", lambda **_: [])
    with Reads() as reads:
        trainer.train_step()
    assert reads.count == 0


def test_flops_are_those_of_the_matrix_products(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from bert_fast import BertForPreTraining
    from bert_fast.kernels import use_impl

    config = BertConfig.from_pretrained(tiny_config.parent, vocab_size=120)
    model = BertForPreTraining(config).eval()
    ids = torch.randint(5, 120, (40,))
    labels = torch.where(torch.arange(40) % 5 == 1, ids, -100)
    counter = FlopCounterMode(display=False)
    with use_impl("reference"), counter, torch.no_grad():
        model.train()(
            input_ids=ids, cu_seqlens=torch.tensor([0, 20, 40], dtype=torch.int32), max_seqlen=20, labels=labels
        )
    expected = model_flops(config, tokens=40, squares=800, masked=8, sequences=2) / 3
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_log_has_the_throughput(config: PretrainConfig) -> None:
    messages: list[str] = []
    result = pretrain(replace(config, ceiling=True), messages.append)
    lines = [line for line in read_log(Path(config.output_dir) / "log.jsonl") if line["kind"] == "train"]
    assert all(0 < line["mfu"] < 1 and line["tflops"] > 0 and 0.5 < line["fill"] <= 1 for line in lines)
    assert result.tokens_per_second > 0
    assert any(text.startswith("matrix products reach ") for text in messages)


def test_a_meter_does_not_count_paused_time(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[float] = [10.0]
    monkeypatch.setattr("bert_fast.pretrain.metrics.time.perf_counter", lambda: now[0])
    meter = Meter(BertConfig.from_pretrained(tiny_config.parent, vocab_size=120), 100, 1e6)

    meter.add(StepBatches(Position(0, 0), Position(0, 1), (), 3, 80, 2200, torch.zeros(0, 2)))
    now[0] += 2.0
    with meter.paused():
        now[0] += 100.0
    lap = meter.lap(10)
    assert lap["tokens_per_second"] == 40
    assert lap["fill"] == 0.8
    assert lap["mfu"] == pytest.approx(lap["tflops"] * 1e6)
    assert (meter.seconds, meter.tokens) == (2.0, 80)


def test_the_ceiling_is_that_of_a_matrix_product() -> None:
    ceiling = gemm_ceiling(torch.device("cpu"), "fp32")
    assert ceiling.dtype == torch.float64
    assert 1e8 < float(ceiling) < 1e14


def test_a_trace_has_the_requested_steps(config: PretrainConfig) -> None:
    pretrain(replace(config, steps=13, trace=2), lambda text: None)
    events = json.loads((Path(config.output_dir) / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#10", "ProfilerStep#11"}
    assert any("attention" in str(event.get("name")) for event in events)


class WeightCasts(TorchDispatchMode):
    """Counts the casts of each matrix of `model` to bfloat16, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._names = {p.data_ptr(): name for name, p in model.named_parameters() if p.dim() == 2}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function is torch.ops.aten._to_copy.default and options.get("dtype") == torch.bfloat16:
            self.counts.update(self._names[p] for p in [args[0].data_ptr()] if p in self._names)
        return function(*args, **options)


def test_a_step_casts_each_weight_once_for_all_micro_batches(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients are those of a block for each micro-batch; a write between two steps is seen, counted or not."""
    trainers = [Trainer(replace(config, precision="bf16", accumulation=3), print) for _ in range(2)]
    monkeypatch.setattr(trainers[1].device_step, "one_cast", lambda _: nullcontext())
    counts, weights = [], []
    with use_impl("reference"):  # which casts through autocast, as the products on a GPU do
        for trainer in trainers:
            trainer.train_step()
            with torch.no_grad():
                trainer.model.bert.encoder.layer[0].output.dense.weight.numpy()[:] *= 1.5  # not counted
            with WeightCasts(trainer.model) as casts:
                trainer.train_step()
            counts.append(casts.counts)
            weights.append(list(trainer.model.parameters()))
    # masked_lm_loss reads its two weights as float32 and casts them by itself.
    by_itself = {"bert.embeddings.word_embeddings.weight", "cls.predictions.transform.dense.weight"}
    assert len(counts[0]) == 4 * len(trainers[0].model.bert.encoder.layer) + 4
    assert counts[0] == {name: 3 if name in by_itself else 1 for name in counts[1]}
    assert counts[1] == dict.fromkeys(counts[0], 3)
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
