"""The benchmarks of whole models on a CPU, with a tiny one: what is compared, refused, timed and written."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models import cpu_inference, cpu_training
from benchmarks.models.cpu_inference import SMOKE, Batch, ModelBenchmark
from benchmarks.reports import plots
from benchmarks.runner import cpu_peers
from benchmarks.runner.cpu_peers import PEERS, AbsentError, Peer
from bert_fast.bench import devices, runner
from bert_fast.bench.devices import Cpu
from bert_fast.kernels._common.benchmarks import evenly_spaced

LIMITS = {"copy_gbytes_per_s": 10.0, "fp32_gemm_gflops": 100.0, "bf16_gemm_gflops": 400.0, "int8_gemm_gflops": 800.0}
SIDES = ("transformers", "bert_fast")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    monkeypatch.setattr(Cpu, "ceilings", lambda _: dict(LIMITS))
    return Cpu()


def test_a_smoke_run_compares_every_precision_and_is_drawn(
    machine: Cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ["--smoke", "--no-compile", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cpu_inference", *flags])
    assert cpu_inference.main() == 0
    (file,) = tmp_path.glob("*/cpu_inference.json")
    report = json.loads(file.read_text())
    rows = {(row["case"], row["variant"]): row for row in report["rows"]}
    for case, tokens in (("(2, 9) infer tiny", 18), ("(3, 12) half filled infer tiny", 24)):
        for variant in ("transformers, eager, fp32", "transformers, bf16", "torch, dynamic, int8", "bert_fast, fp32"):
            row = rows[case, variant]
            assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"])
            assert row["share_of_ceiling"] == pytest.approx(row["gflops"] / LIMITS[f"{row['precision']}_gemm_gflops"])
        assert rows[case, "bert_fast, fp32"]["error"] < 1e-6
        runtime = rows[case, "ONNX Runtime, fp32"]
        assert runtime["ms"] or "pip install onnx onnxscript onnxruntime" in runtime["refused"]
    assert {"load_average_at_start", "cores_busy_with_others", "busy", "openvino"} <= report["environment"].keys()
    batches = cpu_inference.shapes_of("2x7-random", 2, 7)[1]
    row = rows["2 x (1 to 4, 1 to 7) infer tiny", "bert_fast, fp32"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * sum(sum(lengths) for _, lengths in batches) / row["ms"])
    assert row["error"] < 1e-6
    (drawn,) = plots.draw_folder(file.parent)
    assert "bert_fast, bf16" in drawn.read_text()


def test_random_lengths_are_compared_batch_by_batch_and_a_compiled_peer_is_not(machine: Cpu) -> None:
    title, shapes = cpu_inference.shapes_of("24x128-random", 24, 128)
    assert (title, shapes) == cpu_inference.shapes_of("24x128-random", 24, 128)
    lengths = [length for _, part in shapes for length in part]
    assert len(shapes) == 24
    assert len(set(lengths)) > 30
    assert all(seqlen == max(part) for seqlen, part in shapes)
    memory: list[Tensor] = []

    def overwrites(forms: cpu_peers.ModelForms) -> cpu_peers.Encode:
        right = cpu_peers.of_torch(forms.model)

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            if not memory:
                memory.append(torch.empty(4 * 128 * 64))
            hidden = right(ids, mask)
            return memory[0][: hidden.numel()].copy_(hidden.flatten()).view_as(hidden)

        return run

    peers = (PEERS[2], Peer("overwrites", "fp32", overwrites))
    benchmark = ModelBenchmark("base", SMOKE, ("fp32",), peers)
    case = cpu_inference.case(lambda: benchmark, shapes[:3])
    rows = {row.variant: row for row in runner.measure("tiny", case, machine, LIMITS, 0.01)}
    assert rows["overwrites, fp32"].error < 1e-6  # type: ignore[operator]
    assert rows["bert_fast, fp32"].error < 1e-6  # type: ignore[operator]
    assert "compiles for each length" in rows["transformers, torch.compile, fp32"].refused


def test_a_smoke_run_of_training_compares_the_step_in_both_precisions(
    machine: Cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_training", "--smoke", "--record", "--results", str(tmp_path)])
    assert cpu_training.main() == 0
    (file,) = tmp_path.glob("*/cpu_training.json")
    rows = json.loads(file.read_text())["rows"]
    names = [f"{who}, {precision}" for precision in ("fp32", "bf16") for _ in range(2) for who in SIDES]
    assert [row["variant"] for row in rows] == names
    assert all(row["ms"] and row["tokens_per_s"] and row["error"] is not None for row in rows)
    assert max(row["error"] for row in rows if row["precision"] == "fp32") < 1e-5
    assert "train BERT-base" in capsys.readouterr().out


def test_a_training_step_with_a_wrong_gradient_is_refused(machine: Cpu) -> None:
    cpu_training.variants_of.cache_clear()
    case = cpu_training.case(cpu_training.SMOKE, [9, 4, 2], "fp32", False)
    ours = cpu_training.variants_of(cpu_training.SMOKE, False)["bert_fast"].model
    with torch.no_grad():
        ours.bert.encoder.layer[0].output.dense.weight.mul_(1.001)
    rows = {row.variant: row for row in runner.measure("tiny", case, machine, LIMITS, 0.01)}
    assert rows["bert_fast, fp32"].refused.startswith("wrong: error")
    cpu_training.variants_of.cache_clear()


def test_ours_is_not_compared_with_a_peer_of_a_lower_precision(machine: Cpu) -> None:
    x = torch.ones(3)
    precisions = {"a": "int8", "b": "bf16", "c": "fp32", "bert_fast x": "bf16", "bert_fast y": "int8"}
    seconds = {"a": 0.001, "b": 0.003, "c": 0.006, "bert_fast x": 0.002, "bert_fast y": 0.002}

    def waits(name: str) -> Tensor:
        devices.time.sleep(seconds[name])
        return x

    variants = {
        name: runner.Variant(partial(waits, name), precision=precision) for name, precision in precisions.items()
    }
    rows = {
        row.variant: row for row in runner.measure("toy", runner.Case(variants, lambda: x, 0.1), machine, LIMITS, 0.05)
    }
    assert rows["bert_fast x"].ratio_to_best_peer == pytest.approx(rows["b"].ms / rows["bert_fast x"].ms)  # type: ignore[operator]
    assert rows["bert_fast y"].ratio_to_best_peer == pytest.approx(rows["a"].ms / rows["bert_fast y"].ms)  # type: ignore[operator]


def test_ours_outside_its_bound_is_refused_and_a_slow_or_absent_peer_is_named(machine: Cpu) -> None:
    def absent(_: cpu_peers.ModelForms) -> cpu_peers.Encode:
        raise AbsentError("not installed: pip install it")

    peers = (PEERS[1], Peer("other", "fp32", absent))
    benchmark = ModelBenchmark("base", SMOKE, ("fp32",), peers)
    case = partial(cpu_inference.case, lambda: benchmark, [(9, [9, 4])])
    rows = {row.variant: row for row in runner.measure("tiny", case(), machine, LIMITS, 0.01)}
    assert rows["other, fp32"].refused == "AbsentError: not installed: pip install it"
    assert rows["transformers, fp32"].ms
    benchmark.rates[PEERS[1]] = 18 / cpu_inference.SLOWEST / 2
    rows = {row.variant: row for row in runner.measure("tiny", case(), machine, LIMITS, 0.01)}
    assert "too slow: 60 s per call" in rows["transformers, fp32"].refused
    with torch.no_grad():
        benchmark.ours["fp32"].encoder.layer[0].output.dense.weight.mul_(1.01)  # type: ignore[union-attr,index]
    rows = {row.variant: row for row in runner.measure("tiny", case(), machine, LIMITS, 0.01)}
    assert rows["bert_fast, fp32"].refused.startswith("wrong: error")


def test_the_half_filled_batch_is_the_stated_one() -> None:
    assert sum(evenly_spaced(8, 4, 512)) == 2061
    batch = Batch.of([3, 1], 4, 50)
    assert batch.packed["input_ids"].tolist() == batch.real(batch.ids.unsqueeze(2)).flatten().tolist()


def test_a_copy_for_a_peer_shares_its_weights() -> None:
    benchmark = ModelBenchmark("base", SMOKE, ("fp32",), ())
    assert benchmark.forms.eager is not benchmark.model
    assert benchmark.forms.eager.config._attn_implementation == "eager"
    assert benchmark.model.config._attn_implementation == "sdpa"
    ours, theirs = (next(model.parameters()) for model in (benchmark.forms.eager, benchmark.model))
    assert ours.data_ptr() == theirs.data_ptr()


def test_short_calls_follow_an_untimed_one_in_another_order_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(devices.time, "sleep", pauses.append)
    called: list[str] = []
    Cpu(0.5).interleaved({name: [partial(called.append, name)] for name in "abcd"}, 5.0)
    first, rest = called[:4], called[4:]
    assert first == list("abcd")
    assert rest[::2] == rest[1::2]
    rounds = [rest[start : start + 8 : 2] for start in range(0, len(rest), 8)]
    assert all(sorted(order) == first for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert len(rounds) == 5
    assert pauses == [0.5] * 4 * len(rounds)


def test_slow_calls_are_timed_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SHORT", 0.0)
    counts = {"quick": 0, "slow": 0, "slower": 0}
    seconds = {"quick": 0.0, "slow": 0.03, "slower": 0.08}

    def call(name: str) -> None:
        counts[name] += 1
        devices.time.sleep(seconds[name])

    timing = Cpu().interleaved({name: [partial(call, name)] for name in counts}, 0.06)
    assert counts == {"quick": 6, "slow": 4, "slower": 2}, "the first of each is not timed"
    assert all(timing.times[name].median >= seconds[name] for name in counts)


def test_a_busy_machine_is_reported_as_busy() -> None:
    load = devices.Load()
    load.at_start = 100.0 * (devices.os.cpu_count() or 1)
    assert load.of_others()["busy"] is True
    now = devices.Load._now()
    load.at_start, load._since = 0.0, (now[0] - 10.0, now[1] - 9.0, now[2] - 4.0)
    others = load.of_others()
    assert others["busy"] is True
    assert others["cores_busy_with_others"] == pytest.approx(0.5, abs=0.1)
    load._since = (now[0] - 1000.0, now[1] - 900.0, now[2] - 890.0)
    assert load.of_others()["busy"] is False
