"""Records of verified GPU kernels: what is written, which are valid, and what `auto` chooses by them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert_fast import verification
from bert_fast.kernels._common import dispatch, records, triton_support
from bert_fast.kernels._common.dispatch import AutoRule, Availability, Implementation, Op
from bert_fast.kernels._common.times import (
    BACKWARD,
    BOTH,
    FORWARD,
    Size,
    Time,
    of_step,
    size_of_rows,
    size_of_sequences,
    table,
)
from bert_fast.testing import Comparison

PASSED = Comparison("out", 1e-7, 2e-7, 5e-7)
FAILED = Comparison("out", 1e-3, 2e-7, 5e-7)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The package's and the user's folder, both empty; the package is no checkout."""
    package, user = tmp_path / "site-packages" / "bert_fast" / "verified", tmp_path / "cache"
    monkeypatch.setattr(records, "package_folder", lambda: package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return package, user / "bert_fast" / "verified"


def result(op: str, comparison: Comparison, device: str = "cuda", impl: str = "triton") -> verification.Result:
    return verification.Result(op, impl, device, "bfloat16", "erf", (comparison,))


def test_a_record_of_an_older_version_does_not_count(folders: tuple[Path, Path]) -> None:
    folders[1].mkdir(parents=True)
    (folders[1] / "nvidia-h200.json").write_text('{"device": "NVIDIA H200", "operations": {"bias_gelu": {}}}')
    assert "no passing run on a GPU is recorded" in records.verified("bias_gelu", "triton").reason


def test_a_passing_run_is_recorded_and_valid(folders: tuple[Path, Path]) -> None:
    assert "no passing run on a GPU is recorded" in records.verified("bias_gelu", "triton").reason
    path = verification.record([result("bias_gelu", PASSED), result("padding", PASSED, device="cpu")])
    assert path == folders[1] / "nvidia-h200.json"
    assert records.verified("bias_gelu", "triton") == ({90}, "")
    assert not records.verified("padding", "triton").families
    assert not records.verified("bias_gelu", "cuda").families

    record = json.loads(path.read_text())
    assert (record["device"], record["arch"]) == ("NVIDIA H200", "sm_90")
    entry = record["ops"]["bias_gelu"]["triton"]
    assert entry["cases"] == [{"case": "erf", "dtype": "bfloat16", "worst": "out", "error": 1e-7, "bound": 5e-7}]
    assert {"commit", "date", "bert_fast", "torch", "triton", "sources"} <= set(entry)


def test_in_a_checkout_the_record_is_part_of_the_project(folders: tuple[Path, Path]) -> None:
    (folders[0].parents[1] / ".git").mkdir(parents=True)
    assert verification.record([result("bias_gelu", PASSED)]) == folders[0] / "nvidia-h200.json"
    assert records.verified("bias_gelu", "triton") == ({90}, "")
    assert not folders[1].exists()


def test_without_a_checkout_the_environment_names_the_commit(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit() -> str:
        record = json.loads(verification.record([result("bias_gelu", PASSED)]).read_text())
        return str(record["ops"]["bias_gelu"]["triton"]["commit"])

    monkeypatch.delenv("BERT_FAST_COMMIT", raising=False)
    assert commit() == "release"
    monkeypatch.setenv("BERT_FAST_COMMIT", "0123abc")
    assert commit() == "0123abc"


def test_a_failing_run_removes_the_record(folders: tuple[Path, Path]) -> None:
    verification.record([result("bias_gelu", PASSED), result("padding", PASSED)])
    verification.record([result("bias_gelu", PASSED), result("bias_gelu", FAILED)])
    assert not records.verified("bias_gelu", "triton").families
    assert records.verified("padding", "triton") == ({90}, "")


def test_a_record_of_other_sources_is_not_valid(folders: tuple[Path, Path]) -> None:
    path = verification.record([result("bias_gelu", PASSED)])
    record = json.loads(path.read_text())
    record["ops"]["bias_gelu"]["triton"]["sources"] = "0" * 16
    path.write_text(json.dumps(record))
    reason = records.verified("bias_gelu", "triton").reason
    assert "its sources have changed since the last passing run (NVIDIA H200, commit " in reason


def test_nothing_to_record_is_an_error(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="nothing to record"):
        verification.record([result("bias_gelu", PASSED, device="cpu"), result("padding", PASSED, impl="reference")])


def test_comments_do_not_change_the_hash_of_the_sources_but_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "op").mkdir()
    kernel = tmp_path / "op" / "triton.py"
    monkeypatch.setattr(records, "_KERNELS", tmp_path)

    def hashed(text: str) -> str:
        kernel.write_text(text)
        return records.sources_hash.__wrapped__("op")

    before = hashed("def f(x):\n    if x:\n        x = 1\n    return x\n")
    assert hashed("# why\ndef f(x):\n\n    if x:  # or not\n        x = 1\n    return x\n") == before
    assert hashed("def f(x):\n    if x:\n        x = 2\n    return x\n") != before
    assert hashed("def f(x):\n    if x:\n        x = 1\n        return x\n") != before


def test_auto_takes_no_kernel_without_a_record() -> None:
    def op(state: Availability) -> str:
        impls = {
            "reference": Implementation(lambda: "reference", None, None),
            "triton": Implementation(lambda: "triton", "cpu", (torch.float32,), state),
        }
        rule = AutoRule("triton", "cpu", (torch.float32,), "1.0 times")
        impl: str = Op("unlisted", impls, (rule,), {}).select("auto", torch.zeros(1))()
        return impl

    try:
        assert op(Availability(True, False, "no passing run")) == "reference"
        assert op(Availability(True, True, "")) == "triton"
    finally:
        dispatch.OPS.pop("unlisted", None)


def test_auto_takes_a_kernel_on_the_gpus_that_a_record_verified_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: {0: (9, 0), 1: (8, 0), 2: (12, 0)}[index])
    dispatch._family.cache_clear()
    impls = {
        "reference": Implementation(lambda: "reference", None, None),
        "triton": Implementation(lambda: "triton", "cuda", None, families=frozenset({80})),
    }
    op = Op("unlisted", impls, (AutoRule("triton", "cuda", (torch.float32,), "1.0 times"),), {})
    tensors = [types.SimpleNamespace(device=torch.device("cuda", index)) for index in range(3)]
    chosen = [op._automatic(x, torch.float32, None) for x in tensors]  # type: ignore[arg-type]
    dispatch._family.cache_clear()
    assert chosen == ["reference", "triton", "triton"]


def test_the_family_of_a_device_is_a_constant_to_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    dispatch._family.cache_clear()

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + dispatch.device_family(torch.device("cuda", 0))

    compiled = torch.compile(shifted, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 100
    dispatch._family.cache_clear()


BF16 = "bfloat16"
H200 = "NVIDIA H200"


def time_of(tokens: int, longest: int, ms: float, which: str = FORWARD, dim: int = 64, dropout_p: float = 0.0) -> Time:
    return Time(BF16, which, size_of_sequences(tokens, longest, dim, dropout_p), ms)


def automatic(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, list[Time]], dtype: torch.dtype = torch.bfloat16
) -> Callable[..., str]:
    """What `auto` takes of an op with verified Triton and CUDA kernels, whose record has these times; (size, x=...)."""
    monkeypatch.setattr(dispatch, "device_key", lambda device: f"cuda {H200}")
    monkeypatch.setattr(records, "times", lambda device, op, impl: times.get(impl, []) if device == H200 else [])
    monkeypatch.setattr(dispatch, "OPS", {})
    impls = {
        name: Implementation(lambda name=name: name, None if name == "reference" else "cpu", None)
        for name in ("reference", "triton", "cuda")
    }
    rules = tuple(
        AutoRule(impl, "cpu", (torch.bfloat16, torch.float16), "in this order") for impl in ("triton", "cuda")
    )
    op = Op("unlisted", impls, rules, {})

    def chosen(size: Size | None, x: torch.Tensor | None = None) -> str:
        x = torch.zeros(1, dtype=dtype) if x is None else x
        return str(op.select("auto", x, size=size)())

    return chosen


def test_auto_takes_the_implementation_that_was_faster_at_the_nearest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "triton": [time_of(16384, 512, 3.0), time_of(16384, 128, 1.0), time_of(16384, 128, 9.0, BOTH)],
        "cuda": [time_of(16384, 512, 2.0), time_of(16384, 128, 2.0), time_of(16384, 128, 8.0, BOTH)],
    }
    chosen = automatic(monkeypatch, times)
    assert chosen(size_of_sequences(16384, 512, 64, 0.0)) == "cuda"
    assert chosen(size_of_sequences(4096, 384, 64, 0.0)) == "cuda"
    assert chosen(size_of_sequences(16384, 128, 64, 0.0)) == "triton"
    assert chosen(size_of_sequences(9, 3, 64, 0.0)) == "triton"
    training = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    assert chosen(size_of_sequences(9, 3, 64, 0.0), training) == "cuda"
    with torch.no_grad():
        assert chosen(size_of_sequences(9, 3, 64, 0.0), training) == "triton"
    assert chosen(None) == "cuda"  # the largest


def test_auto_keeps_the_order_of_its_rules_where_the_record_has_no_such_time(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = [time_of(16384, 512, 1.0)]
    size = size_of_sequences(16384, 512, 64, 0.0)
    assert automatic(monkeypatch, {})(size) == "triton"
    assert automatic(monkeypatch, {"cuda": faster})(size) == "triton"
    both = {"cuda": faster, "triton": [time_of(16384, 512, 2.0)]}
    assert automatic(monkeypatch, both)(size) == "cuda"
    assert automatic(monkeypatch, both)(size_of_sequences(16384, 512, 128, 0.0)) == "triton"
    assert automatic(monkeypatch, both)(size_of_sequences(16384, 512, 64, 0.1)) == "triton"
    assert automatic(monkeypatch, both, torch.float16)(size) == "triton"
    assert automatic(monkeypatch, both, torch.float32)(size) == "reference"  # no rule
    chosen = automatic(monkeypatch, both)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(size) == "triton"


def test_passes_that_were_timed_apart_count_together_in_training() -> None:
    size = size_of_rows(16384, 1024)
    times = [Time(BF16, FORWARD, size, 1.0), Time(BF16, BACKWARD, size, 2.5)]
    assert of_step(times, BF16, training=False) == {size: 1.0}
    assert of_step(times, BF16, training=True) == {size: 3.5}
    assert of_step([*times, Time(BF16, BOTH, size, 3.0)], BF16, training=True) == {size: 3.0}
    assert of_step(times[:1], BF16, training=True) == {}
    assert of_step(times, "float16", training=False) == {}


def test_times_are_kept_with_the_run_that_verified_the_same_sources(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = size_of_rows(16384, 4096)
    slow, fast = Time(BF16, FORWARD, size, 2.0), Time(BF16, FORWARD, size, 1.0)
    assert records.write_times(H200, "bias_gelu", "triton", [slow]) is None
    path = verification.record([result("bias_gelu", PASSED)])
    assert records.write_times(H200, "bias_gelu", "triton", [slow]) == path
    assert records.write_times(H200, "bias_gelu", "triton", [fast]) == path
    assert records.times(H200, "bias_gelu", "triton") == [fast]
    assert records.times("NVIDIA A100", "bias_gelu", "triton") == []
    assert records.times(H200, "bias_gelu", "cuda") == []
    verification.record([result("bias_gelu", PASSED)])
    assert records.times(H200, "bias_gelu", "triton") == [fast]
    monkeypatch.setattr(records, "sources_hash", lambda op, impl="triton": "others")
    assert records.times(H200, "bias_gelu", "triton") == []
    assert records.write_times(H200, "bias_gelu", "triton", [fast]) is None
    verification.record([result("bias_gelu", PASSED)])  # of the other sources
    assert records.times(H200, "bias_gelu", "triton") == []
    verification.record([result("bias_gelu", FAILED)])
    assert "triton" not in json.loads(path.read_text())["ops"]["bias_gelu"]


def test_times_are_shown_with_the_fastest_first() -> None:
    times = {"triton": [time_of(16384, 512, 3.0, dropout_p=0.1)], "cuda": [time_of(16384, 512, 2.0, dropout_p=0.1)]}
    (line,) = table(times)
    assert line == "bfloat16 forward, 16384 tokens, up to 512 a sequence, D 64, dropout: cuda 2 ms, triton 3 ms"
    assert table({"cuda": [Time(BF16, BACKWARD, size_of_rows(8, 9), 1.5)]}) == [
        "bfloat16 backward, (8, 9): cuda 1.5 ms"
    ]


def test_linear_follows_the_times_of_bias_gelu() -> None:
    assert {name for name, op in dispatch.OPS.items() if op.timed_as != name} == {"linear"}
    assert dispatch.OPS["linear"].timed_as == "bias_gelu"


def test_the_reasons_that_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this build of torch has no CUDA" in triton_support._missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no CUDA device was found" in triton_support._missing()
    monkeypatch.setattr(triton_support.importlib.metadata, "version", lambda _: "3.5.1")
    assert "triton 3.5.1 is too old: expected 3.6 or newer" in triton_support._missing()
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda _: None)
    assert "triton is not installed" in triton_support._missing()
