"""The runner and the benchmarks of ops on small cases: what is compared, refused, timed, written and interrupted."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models import fuse_speed
from benchmarks.reports import plots
from benchmarks.runner import whole_models
from bert_fast.bench import runner, table
from bert_fast.bench.devices import Cpu, Cuda, Timing, machine_of
from bert_fast.bench.kernels import case_of, plans
from bert_fast.bench.runner import Case, Plan, Variant
from bert_fast.bench.samples import summary
from bert_fast.kernels import available_impls
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.benchmarks import half_filled
from bert_fast.kernels.attention.cases import gpu_benchmark

CPU = torch.device("cpu")
OPS = list(available_impls())
LIMITS = {"copy_gbytes_per_s": 10.0, "fp32_gemm_gflops": 100.0, "bf16_gemm_gflops": 400.0}
X = torch.tensor([1.0, -2.0, 4.0])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    monkeypatch.setattr(Cpu, "ceilings", lambda _: dict(LIMITS))
    return Cpu()


def waits(seconds: float, result: Tensor) -> Variant:
    def run() -> Tensor:
        time.sleep(seconds)
        return result

    return Variant(run)


def refuses() -> Tensor:
    raise RuntimeError("this backend takes no mask\nand more lines")


def toy(**more: Variant) -> Case:
    variants = {"eager": waits(0.004, X), "bert_fast toy": waits(0.002, X + 1e-6), **more}
    return Case(variants, X.double, 1e-5, traffic=10_000_000)


def test_medians_shares_and_ratios_follow_the_clock(machine: Cpu) -> None:
    eager, ours = runner.measure("toy", toy(), machine, LIMITS, 0.05)
    assert (eager.variant, ours.variant, ours.timing) == ("eager", "bert_fast toy", "calls")
    assert eager.ms is not None
    assert ours.ms is not None
    assert 4 <= eager.ms < 40
    assert 2 <= ours.ms < eager.ms
    assert ours.gbytes_per_s == pytest.approx(10.0 / ours.ms)
    assert ours.share_of_ceiling == pytest.approx(1.0 / ours.ms)
    assert ours.ratio_to_best_peer == pytest.approx(eager.ms / ours.ms)
    assert ours.error == pytest.approx(1e-6 / 4, rel=0.1)


@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, 100.0), (torch.float16, 400.0)], ids=str)
def test_flops_are_compared_with_the_product_of_the_dtype(machine: Cpu, dtype: torch.dtype, product: float) -> None:
    case = Case({"eager": waits(0.001, X)}, X.double, 0.0, flops=10**8, dtype=dtype)
    (row,) = runner.measure("toy", case, machine, LIMITS, 0.01)
    assert row.gflops is not None
    assert row.share_of_ceiling == pytest.approx(row.gflops / product)


def test_a_failure_of_ours_is_a_refused_row_and_the_exit_code(
    machine: Cpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {
        "bert_fast wrong": waits(0.0, X + 1),
        "bert_fast broken": Variant(refuses),
        "bert_fast nan": waits(0.0, X * float("nan")),
    }
    reasons = {
        "bert_fast wrong": "wrong: error 0.25 exceeds 1e-05",
        "bert_fast broken": "RuntimeError: this backend takes no mask",
        "bert_fast nan": "wrong: error inf exceeds 1e-05",
    }
    options = runner.arguments("").parse_args(["--record", "--results", str(tmp_path), "--quick"])
    plans = [Plan("first", toy), Plan("failing", lambda: toy(**broken)), Plan("last", toy)]
    assert runner.main("toy", plans, options, machine) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"failed: failing, {label}: {reason}" for label, reason in reasons.items()]
    (file,) = tmp_path.glob("*/toy.json")
    report = json.loads(file.read_text())
    assert {row["variant"]: row["refused"] for row in report["rows"] if row["refused"]} == reasons
    assert len([row for row in report["rows"] if row["ms"]]) == 6
    assert len(report["failures"]) == 3
    assert runner.main("toy", plans[:1], options, machine) == 0
    options.warm = True
    assert runner.main("toy", plans, options, machine) == 1


def test_a_report_is_written_after_every_case(machine: Cpu, tmp_path: Path) -> None:
    options = runner.arguments("").parse_args(["--record", "--results", str(tmp_path), "--quick"])

    def killed() -> Case:
        raise SystemExit("the device is lost")

    with pytest.raises(SystemExit):
        runner.main("toy", [Plan("a", toy), Plan("b", killed), Plan("c", toy)], options, machine)
    (file,) = tmp_path.glob("*/toy.json")
    report = json.loads(file.read_text())
    assert {row["case"] for row in report["rows"]} == {"a"}
    assert report["left_out"] == ["b", "c"]


def test_a_peer_that_raises_or_is_wrong_is_listed_with_the_reason(machine: Cpu) -> None:
    case = toy(flash=Variant(refuses), other=waits(0.0, X + 1), random=replace(waits(0.001, -X), comparable=False))
    rows = {row.variant: row for row in runner.measure("toy", case, machine, LIMITS, 0.01)}
    assert rows["flash"].refused == "RuntimeError: this backend takes no mask"
    assert rows["other"].refused.startswith("wrong: error 0.25")
    assert rows["flash"].ms is rows["other"].ms is None
    assert rows["random"].error is None
    assert rows["random"].ms is not None
    assert "refused: RuntimeError: this backend" in table.markdown([asdict(row) for row in rows.values()])


def test_a_report_is_written_and_names_what_was_left_out(machine: Cpu, tmp_path: Path) -> None:
    toys = [Plan("(1, 3) float32 forward", toy), Plan("(2, 3) float32 forward", toy)]
    report = runner.run("toy", toys, machine, 0.01)
    runner.write(report, "toy", tmp_path)
    (file,) = tmp_path.glob("*/toy.json")
    read = json.loads(file.read_text())
    assert file.parent.name == read["environment"]["device"]
    assert read["ceilings"] == LIMITS
    assert [row["case"] for row in read["rows"]] == [plan.name for plan in toys for _ in range(2)]
    assert {"torch", "commit", "date", "threads"} <= read["environment"].keys()
    late = runner.run("toy", toys, machine, 0.01, budget=0.0)
    assert late["left_out"] == [plan.name for plan in toys]


def test_on_a_gpu_compiled_peers_are_timed_after_everything_else(machine: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", torch.device("cuda"))
    monkeypatch.setattr(runner, "YARDSTICK", "none")
    plain = replace(toy(), flops=1)
    both = replace(toy(**{"torch.compile": waits(0.001, X)}), flops=1)
    reports: list[dict[str, object]] = []
    plans = [Plan("a", lambda: both), Plan("b", lambda: plain)]
    final = runner.run("toy", plans, machine, 0.01, save=reports.append)
    assert [[row["variant"] for row in report["rows"]] for report in reports] == [  # type: ignore[attr-defined]
        ["eager", "bert_fast toy"],
        ["eager", "bert_fast toy"] * 2,
        ["eager", "bert_fast toy", "torch.compile", "eager", "bert_fast toy"],
    ]
    assert [report.get("left_out", []) for report in reports] == [["b", "a, torch.compile"], ["a, torch.compile"], []]
    assert final == reports[-1]


class Graph:
    """Stands for a CUDA graph: what is run while it is captured is its call."""

    replayed = 0

    def replay(self) -> None:
        Graph.replayed += 1


def test_a_variant_that_cannot_be_captured_is_refused_and_the_others_keep_their_graphs(
    machine: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu = Cuda.__new__(Cuda)
    gpu.stream = None  # type: ignore[assignment]

    graphs, refused = gpu._captured({"quick": [lambda: X], "waits": [lambda: X, refuses], "last": [lambda: X] * 2})
    assert list(graphs) == ["quick", "last"]
    assert [graph() is X for graph in graphs["last"]] == [True, True]
    assert Graph.replayed == 2
    reason = "RuntimeError: this backend takes no mask"
    assert refused == {"waits": f"cannot be captured in a CUDA graph: {reason}"}

    timing = Timing({"bert_fast toy": summary([1e-3])}, "graph", {"eager": refused["waits"]})
    monkeypatch.setattr(Cpu, "interleaved", lambda *_: timing)
    eager, ours = runner.measure("toy", toy(), machine, LIMITS, 0.1)
    assert (ours.ms, ours.timing, ours.ratio_to_best_peer) == (1.0, "graph", None)
    assert (eager.ms, eager.refused) == (None, refused["waits"])


def test_warming_up_compares_every_case_and_times_none(machine: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "interleaved", lambda *_: pytest.fail("timed"))
    names: list[str] = []
    runner.warm([Plan(name, lambda name=name: names.append(name) or toy()) for name in ("a", "b")], machine)  # type: ignore[misc,func-returns-value]
    assert names == ["a", "b"]
    assert runner.warm([Plan("c", lambda: toy(**{"bert_fast wrong": waits(0.0, X + 1)}))], machine) == [
        "c, bert_fast wrong: wrong: error 0.25 exceeds 1e-05"
    ]


def test_an_interrupted_run_reports_what_was_measured(machine: Cpu) -> None:
    def interrupted() -> Case:
        raise KeyboardInterrupt

    report = runner.run("toy", [Plan("a", toy), Plan("b", interrupted), Plan("c", toy)], machine, 0.01)
    assert {row["case"] for row in report["rows"]} == {"a"}
    assert report["left_out"] == ["b", "c"]


@pytest.mark.parametrize("which", ["forward", "backward", "forward + backward"])
def test_passes_return_the_output_or_the_gradients(which: str) -> None:
    x, indices, dout = torch.randn(3, 2), torch.tensor([2, 0]), torch.randn(2, 2)
    call = runner.passes(lambda x, indices: 3 * x[indices], (x, indices), dout, which)
    assert [read.shape for read in call.inputs] == [x.shape, indices.shape, *[dout.shape] * (which != "forward")]
    for _ in range(2):
        result = call.run()
    if which == "forward":
        assert isinstance(result, Tensor)
        assert torch.equal(result, 3 * x[indices])
    else:
        assert torch.equal(result[0], torch.zeros(3, 2).index_add(0, indices, 3 * dout))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_names_of_an_ops_benchmarks_are_unique(op: str, device: str) -> None:
    names, quick = (
        [plan.name for plan in cases.load(op).benchmarks(torch.device(device), is_quick)] for is_quick in (False, True)
    )
    assert bool(names) != (device == "cuda" and op == "linear_int8")
    assert len(set(names)) == len(names)
    assert set(quick) <= set(names)
    assert not any(plots.split(name)[1] == "" for name in names)


@pytest.mark.parametrize("op", OPS)
def test_every_variant_of_an_ops_first_benchmark_is_right(
    op: str, machine: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plan = plans(op, CPU, True)[0]
    case = plan.make()
    checked = runner.checked(case, machine)
    assert not checked.refused
    assert len(checked.runs) == len(case.variants) >= 2
    assert any(name.startswith("bert_fast") for name in case.variants)
    assert case.traffic + case.flops > 0


@pytest.mark.parametrize("which", ["forward", "forward + backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
def test_the_gpu_benchmark_of_attention_is_right_on_a_cpu(which: str, dropout_p: float, machine: Cpu) -> None:
    benchmark = gpu_benchmark(CPU, [5, 9, 1], 512, torch.float32, which, dropout_p, False)
    case = case_of("attention", CPU, benchmark)
    checked = runner.checked(case, machine)
    assert {"SDPA math (eager)", "bert_fast cpu", "bert_fast cpu, with bias"} <= checked.runs.keys()
    assert (checked.errors["SDPA math (eager)"] is None) == bool(dropout_p)
    assert not dropout_p or "varlen_attn has no dropout" in checked.refused["varlen_attn"]


def test_half_filled_batches_have_the_stated_mean() -> None:
    lengths = half_filled(100, 512)
    assert lengths.count(512) == 23
    assert sum(lengths) / 100 == pytest.approx(254, abs=0.5)
    assert min(lengths) >= 1


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_of(None).device.type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        machine_of("cuda")


@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_is_timed_before_and_after_fuse(dtype: torch.dtype, kind: str, machine: Cpu) -> None:
    size = whole_models.Size("tiny", 1, 24, 32, heads=2, vocabulary=50, batch=3, seqlen=8)
    assert size.flops([8, 8]) == 2 * size.flops([8])
    case = fuse_speed.case(CPU, size, " half filled", dtype, kind)
    rows = runner.measure("tiny", case, machine, LIMITS, 0.01)
    assert [row.variant for row in rows] == ["transformers", "bert_fast fuse"]
    assert all(row.ms and row.error is not None and not row.refused for row in rows)
    ours = case.variants["bert_fast fuse"]
    wrong = Variant(ours.run, lambda result: ours.result(result) * 1.2)
    (row,) = runner.measure("tiny", replace(case, variants={"bert_fast fuse": wrong}), machine, LIMITS, 0.01)
    assert row.refused.startswith("wrong: error")


def test_every_case_of_fuse_is_named_once() -> None:
    names = [plan.name for plan in fuse_speed.plans(torch.device("cuda"), quick=False)]
    assert len(set(names)) == len(names) == 16
    assert {plots.split(name)[1] for name in names} == {"infer", "train"}
