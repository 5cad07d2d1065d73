"""`bert-fast tune`: what `impl="auto"` takes by the table in the user's cache, and what it never takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bert_fast import BertConfig
from bert_fast._lock import OutputBusyError, exclusive
from bert_fast.bench import tune as module
from bert_fast.bench.devices import Cpu
from bert_fast.bench.tune import Request, config_of, reset, tune
from bert_fast.cli import info
from bert_fast.cli.main import main
from bert_fast.kernels import bias_gelu, register, unregister
from bert_fast.kernels._common import dispatch, tuned
from bert_fast.kernels._common.dispatch import IMPLS, OPS
from bert_fast.kernels._common.times import size_of_rows

CONFIG = BertConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
OP, SIZE = OPS["bias_gelu"], size_of_rows(32, 64)


def right(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu((x.float() + bias.float()), approximate=approximate).to(x.dtype)


def wrong(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu((x.float() + bias.float()), approximate="tanh").to(x.dtype)


def slow(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    time.sleep(0.002)
    return right(x, bias, approximate=approximate)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache of its own, ours at least 1 ms slow, and no kernel registered afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Cpu, "ceilings", lambda self: {"copy_gbytes_per_s": 1e6, "fp32_gemm_gflops": 1e9})
    dispatch.forget_times(table=True)
    yield tmp_path
    for name in [name for name in OP.impls if name not in IMPLS]:
        unregister("bias_gelu", name)
    dispatch.forget_times(table=True)


@pytest.fixture
def slow_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours waits a millisecond: what is registered is faster, on any machine."""
    ours = OP.impls["cpu"].call

    def call(*arguments: Any) -> Any:
        time.sleep(0.001)
        return ours(*arguments)

    monkeypatch.setitem(OP.impls, "cpu", replace(OP.impls["cpu"], call=call))


def run(**changes: Any) -> Path | None:
    options = {"shapes": ["1x32"], "dtypes": [torch.float32], "training": False, "seconds": 0.05, "ops": ["bias_gelu"]}
    return tune(Request(CONFIG, **{**options, **changes}), Cpu())  # type: ignore[arg-type]


def chosen(dtype: torch.dtype = torch.float32, width: int = 64) -> str:
    return OP._automatic(torch.zeros(32, width, dtype=dtype), dtype, size_of_rows(32, width))


@pytest.mark.usefixtures("slow_ours")
def test_a_faster_kernel_is_taken_after_tune_only_and_where_it_was_measured() -> None:
    register("bias_gelu", "mine", right)
    assert chosen() == "cpu"
    path = run()
    assert path is not None
    assert chosen() == "mine"
    assert chosen(torch.bfloat16) == "cpu", "not verified in this dtype"
    assert chosen(width=48) == "cpu", "not measured at this width"
    x, bias = torch.randn(32, 64), torch.randn(64)
    expected = right(x, bias)
    assert torch.equal(bias_gelu(x, bias), expected)


@pytest.mark.usefixtures("slow_ours")
def test_the_table_is_read_once_and_never_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    register("bias_gelu", "mine", right)
    run()
    chosen()
    monkeypatch.setattr(tuned, "read", lambda device: pytest.fail("read again"))
    monkeypatch.setattr(tuned, "source_hash", lambda functions: pytest.fail("read again"))
    assert chosen() == "mine"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen() == "cpu"


@pytest.mark.usefixtures("slow_ours")
def test_a_wrong_kernel_is_never_taken(capsys: pytest.CaptureFixture[str]) -> None:
    register("bias_gelu", "mine", wrong)
    assert run() is None
    assert "bias_gelu mine: not measured, the oracle found" in capsys.readouterr().out
    assert chosen() == "cpu"


def test_a_slower_kernel_is_measured_and_not_taken(cache: Path) -> None:
    register("bias_gelu", "mine", slow)
    path = run()
    assert path is not None
    assert set(json.loads(path.read_text())["ops"]["bias_gelu"]) == {"cpu", "mine"}
    assert chosen() == "cpu"


@pytest.mark.usefixtures("slow_ours")
def test_another_source_makes_the_times_stale() -> None:
    register("bias_gelu", "mine", right)
    run()
    unregister("bias_gelu", "mine")
    assert chosen() == "cpu", "not registered"
    assert info.collect()["tuned"]["ignored"] == ["bias_gelu mine is not registered; its times don't count"]
    register("bias_gelu", "mine", wrong)  # faster, by the table
    assert chosen() == "cpu"
    assert info.collect()["tuned"]["ignored"] == ["bias_gelu mine is of another source; its times don't count"]
    unregister("bias_gelu", "mine")
    register("bias_gelu", "mine", right)
    assert chosen() == "mine"


@pytest.mark.usefixtures("slow_ours")
def test_what_is_refused_later_leaves_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    register("bias_gelu", "mine", right)
    path = run()
    monkeypatch.setattr(module, "find_mismatches", lambda *arguments, **options: ["a mismatch"])
    assert run() == path
    assert "mine" not in json.loads(path.read_text())["ops"]["bias_gelu"]  # type: ignore[union-attr]
    assert chosen() == "cpu"


@pytest.mark.usefixtures("slow_ours")
def test_training_has_times_of_its_own() -> None:
    register("bias_gelu", "mine", right)
    run(training=True)
    x = torch.zeros(32, 64, requires_grad=True)
    assert OP._automatic(x, x.dtype, SIZE) == "mine"
    assert {time.which for time in OP.times("cpu")["mine"]} == {"forward", "forward + backward"}


def change(path: Path, field: str, value: Any) -> None:
    values = json.loads(path.read_text())
    values[field] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_text("{"), "can't be read: .*not valid JSON"),
        (lambda path: path.write_bytes(b"\xff\x00"), "can't be read"),
        (lambda path: change(path, "device", "cpu of others"), "is of 'cpu of others', and this device is"),
        (lambda path: change(path, "schema", "bert_fast.tuned/0"), "has the schema"),
        (lambda path: change(path, "environment", {}), "was measured with another torch, build, cpu_features"),
        (lambda path: change(path, "ops", {"bias_gelu": {"mine": {"times": 3}}}), "has no 'source'"),
        (lambda path: change(path, "ops", {"bias_gelu": []}), "can't be read"),
    ],
)
@pytest.mark.usefixtures("slow_ours")
def test_a_table_that_does_not_count_is_ignored(damage: Callable[[Path], None], why: str) -> None:
    register("bias_gelu", "mine", right)
    path = run()
    assert path is not None
    damage(path)
    dispatch.forget_times(table=True)
    assert chosen() == "cpu"
    (line,) = info.collect()["tuned"]["ignored"]
    assert re.search(why, line), line
    assert run() == path, "it is replaced"
    assert chosen() == "mine"


@pytest.mark.usefixtures("slow_ours")
def test_reset_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--reset", "--device", "cpu"]) == 0
    assert "there is no table" in capsys.readouterr().out
    register("bias_gelu", "mine", right)
    path = run()
    report = info.collect()
    assert report["tuned"] == {"file": str(path), "ignored": []}
    assert report["operations"]["bias_gelu"]["mine"]["chosen"]
    assert any("(32, 64): mine " in line for line in report["times"]["bias_gelu"])
    assert reset("cpu") == path
    assert not path.exists()  # type: ignore[union-attr]
    assert chosen() == "cpu"


def test_one_process_at_a_time() -> None:
    path = tuned.path_of(tuned.device_label("cpu"))
    path.parent.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from bert_fast._lock import exclusive\n"
        "with exclusive(Path(sys.argv[1]), what='bert-fast tune'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputBusyError, match="another bert-fast tune"):
            run()
        other.communicate("")
    register("bias_gelu", "mine", slow)
    with exclusive(path.with_name("another.json"), what="bert-fast tune"):
        assert run() == path


def test_the_sizes_are_those_that_the_model_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size that a forward pass gives to the choice is one that tune measures, but for linear's in the layers."""
    from bert_fast import BertModel
    from bert_fast.kernels._common import cases

    asked: set[tuple[str, Any]] = set()
    select = dispatch.Op.select

    def recording(self: Any, impl: str, x: Tensor, dtype: Any = None, size: Any = None) -> Any:
        if size is not None:
            asked.add((self.name, size))
        return select(self, impl, x, dtype, size)

    monkeypatch.setattr(dispatch.Op, "select", recording)
    model = BertModel(CONFIG).eval()
    ids = torch.randint(5, 50, (8, 16))
    with torch.inference_mode():
        model(ids)
    request = Request(CONFIG, ["8x16"], [torch.float32], False, 0.1)
    measured = set()
    for call in request.calls(torch.float32).values():
        for op in module.tunable():
            for make in cases.load(op).in_model(torch.device("cpu"), call).values():  # type: ignore[misc]
                measured.add((op, make().size))
    asked = {(op, size) for op, size in asked if op in ("attention", "add_layer_norm")}
    assert asked
    assert asked <= measured


def test_a_model_is_a_size_or_a_folder(tmp_path: Path) -> None:
    assert config_of("base").hidden_size == 768
    CONFIG.save_pretrained(tmp_path)
    assert config_of(str(tmp_path)).hidden_size == 32
    assert main(["tune", "no-such-size-or-folder/at-all/here"]) == 2


def test_the_command_measures_kernels_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path / "model")
    assert main(["tune", str(tmp_path / "model"), "--device", "cpu", "--ops", "bias_gelu", "--shapes", "1x8"]) == 0
    assert "nothing to choose" in capsys.readouterr().out
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "from torch.nn import functional\nfrom bert_fast.kernels import register\n"
        "def fn(x, bias, *, approximate='none'):\n"
        "    return functional.gelu(x.float() + bias.float(), approximate=approximate).to(x.dtype)\n"
        "register('bias_gelu', 'of_file', fn)\n"
    )
    options = ["--ops", "bias_gelu", "--shapes", "1x8", "--seconds", "0.05", "--precisions", "fp32"]
    assert main(["tune", str(tmp_path / "model"), "--device", "cpu", "--kernels", str(kernel), *options]) == 0
    out = capsys.readouterr().out
    assert "bias_gelu GeLU 1x8 float32 forward: of_file" in out
    assert "written: " in out
