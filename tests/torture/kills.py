"""Attacks on outputs: signals before every call on a file and at random moments, two writers at once, a full disk.

Whatever ends a command, its output is what it was before or the new one, complete; the same command, run again,
succeeds and leaves what an uninterrupted run leaves, to the bit, and no other file. Only what SIGKILL leaves of a
temporary file may stay until then.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture.attack import Attack, Broken, Case
from tests.torture.material import finetune_command, prepare_command, pretrain_command
from tests.torture.process import Ended, Running, command, require_command_error

# What a run reports of itself: how long it took, where it ran.
_VARYING = {"metrics.json", "finetune.json", "log.jsonl", "pretrain.json", "report.json", "report.html"}


def _verified_checkpoints(target: Path) -> None:
    """Every checkpoint that has its name is what its manifest says."""
    for manifest in [*target.glob("checkpoints/step-*/manifest.json"), *target.glob("final/manifest.json")]:
        for name, entry in json.loads(manifest.read_text())["files"].items():
            if hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() != entry["sha256"]:
                raise Broken(f"{manifest.parent.name}/{name} is not what the manifest says")
    for folder in target.glob("checkpoints/step-*"):
        if not (folder / "manifest.json").is_file():
            raise Broken(f"{folder.name} has no manifest")


def _same_run(target: Path, expected: Path, *, temporary: bool = False) -> str:
    """The losses and the weights of a pretraining run."""

    def losses(folder: Path) -> list[Any]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [tuple(line.get(key) for key in ("kind", "step", "loss", "mlm_loss", "grad_norm")) for line in lines]

    if not (target / "final" / "model.safetensors").is_file():
        return "no final model"
    if losses(target) != losses(expected):
        return "other losses in log.jsonl"
    return _same_tree(target / "final", expected / "final")


def _same_tree(target: Path, expected: Path, *, temporary: bool = False) -> str:
    """How two files or folders differ, apart from `_VARYING`, manifests and, if allowed, temporary files."""
    if expected.is_file():
        return "" if target.is_file() and target.read_bytes() == expected.read_bytes() else "other bytes"
    names = [
        sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) for root in (target, expected)
    ]
    if temporary:
        names[0] = [name for name in names[0] if not re.search(r"(^|/)\.[^/]*\.(tmp|old)$", name)]
    if names[0] != names[1]:
        return f"other files: {sorted(set(names[0]) ^ set(names[1]))}"
    for name in names[1]:
        if Path(name).name not in _VARYING and name != "manifest.json":
            if (target / name).read_bytes() != (expected / name).read_bytes():
                return f"other bytes in {name}"
        elif name.endswith(".json"):
            json.loads((target / name).read_text())
    return ""


@dataclass(frozen=True)
class Operation:
    """A command that replaces `target` in a folder.

    Attributes:
        target: its output: a file or a folder.
        run: (folder, material) -> the command.
        old: (folder, material): write what was there before; None if nothing was.
        check: (the target): raises `Broken`; for a target that is written in steps.
        same: (the target, expected old or new) -> how they differ.
    """

    name: str
    target: str
    run: Callable[[Path, Path], Callable[[], Any]]
    old: Callable[[Path, Path], None] | None = None
    check: Callable[[Path], None] | None = None
    same: Callable[..., str] = _same_tree


def _save_pretrained(folder: Path, hidden: int) -> Callable[[], None]:
    def run() -> None:
        import torch

        from bert_fast import BertConfig, BertForMaskedLM

        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        BertForMaskedLM(BertConfig(hidden_size=hidden, **sizes)).save_pretrained(folder / "model")

    return run


def _in_fork(function: Callable[[], Any], folder: Path) -> Ended:
    """Run `function` uninterrupted in `folder`."""
    ended = Running(function, folder, folder.parent / "prints").wait()
    if ended.code:
        raise Broken(f"uninterrupted it ends with {ended.code}: {ended.err.strip()[-300:]}")
    return ended


def _old_model(folder: Path, material: Path) -> None:
    _in_fork(_save_pretrained(folder, 16), folder)


def _old_tuned(folder: Path, material: Path) -> None:
    shutil.copytree(material / "tuned", folder / "tuned")


def _old_data(folder: Path, material: Path) -> None:
    shutil.copytree(material / "data", folder / "data")


def _old_file(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, material: (folder / name).write_text("old\n") and None  # type: ignore[func-returns-value]


def _embed(name: str) -> Operation:
    def run(folder: Path, material: Path) -> Callable[[], Any]:
        texts = ["a small bird sings.", "the old house", "it was very sad"] * 20
        return command("embed", material / "base", *texts, "--output", folder / name)

    return Operation(f"embed {name}", name, run, _old_file(name))


def _predict(name: str) -> Operation:
    def run(folder: Path, material: Path) -> Callable[[], Any]:
        return command("predict", material / "tuned", "--file", material / "dev.csv", "--output", folder / name)

    return Operation(f"predict {name}", name, run, _old_file(name))


def _evaluate(folder: Path, material: Path) -> Callable[[], Any]:
    return command("evaluate", material / "tuned", material / "dev.csv", "--metrics", folder / "m.json")


def _pretrain(folder: Path, material: Path) -> Callable[[], Any]:
    return pretrain_command(folder / "run", material)


def _prepare(folder: Path, material: Path) -> Callable[[], Any]:
    return prepare_command(folder / "data", material / "corpus.txt", vocab_size=100, overwrite="true")


def _finetune(folder: Path, material: Path) -> Callable[[], Any]:
    return finetune_command(folder / "tuned", material, overwrite="true", seed=1, report="true")


OPERATIONS = [
    Operation("pretrain", "run", _pretrain, None, _verified_checkpoints, _same_run),
    Operation("prepare", "data", _prepare, _old_data),
    Operation("finetune", "tuned", _finetune, _old_tuned),
    Operation("save_pretrained", "model", lambda folder, material: _save_pretrained(folder, 24), _old_model),
    *(_embed(f"v.{suffix}") for suffix in ("npy", "jsonl", "parquet")),
    *(_predict(f"p.{suffix}") for suffix in ("jsonl", "csv")),
    Operation("evaluate --metrics", "m.json", _evaluate, _old_file("m.json")),
]
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def _expected(material: Path, operation: Operation) -> Path:
    return material / "uninterrupted" / operation.name


def _uninterrupted(material: Path, operation: Operation) -> tuple[int, float]:
    """(calls on files, seconds) of the command uninterrupted; keeps what it leaves, as `_expected`."""
    folder = _expected(material, operation)
    notes = folder / "notes.json"
    if not notes.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("old", "new"):
            (folder / name).mkdir(parents=True)
            if operation.old is not None:
                operation.old(folder / name, material)
        run, modules = operation.run(folder / "new", material), folder / "modules.json"

        def run_and_list_modules() -> Any:
            try:
                return run()
            finally:
                modules.write_text(json.dumps(sorted(sys.modules)))

        _in_fork(run_and_list_modules, folder / "new")
        _import(modules)
        begin = time.monotonic()
        shutil.rmtree(folder / "new")
        shutil.copytree(folder / "old", folder / "new")
        ended = _in_fork(run, folder / "new")
        notes.write_text(json.dumps([ended.calls, time.monotonic() - begin]))
    _import(folder / "modules.json")
    calls, seconds = json.loads(notes.read_text())
    return calls, seconds


def _import(listed: Path) -> None:
    """Import here what a command imports, so that the forks need not."""
    for name in json.loads(listed.read_text()):
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def run_uninterrupted(material: str) -> None:
    """Run every command once, uninterrupted."""
    for operation in OPERATIONS:
        _uninterrupted(Path(material), operation)


def _state(operation: Operation, folder: Path, material: Path) -> str:
    """ "old" or "new"; `Broken` if the output in `folder` is neither."""
    if operation.check is not None:
        operation.check(folder / operation.target)
    faults = []
    for state in ("new", "old"):
        expected = _expected(material, operation) / state / operation.target
        if not expected.exists():
            if operation.check is not None or not (folder / operation.target).exists():
                return state
            continue
        # Between two renames the old output has another name, from which the next writer restores it.
        moved = sorted(folder.glob(f".{operation.target}.*.old"))
        target = folder / operation.target
        if not target.exists() and moved:
            target = moved[0]
        if not target.exists():
            faults.append("missing")
            continue
        try:
            fault = operation.same(target, expected, temporary=True)
        except (OSError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        if not fault:
            return state
        faults.append(fault)
    raise Broken(f"{operation.name}: the output is neither the new one ({faults[0]}) nor the old ({faults[-1]})")


def _check_end(operation: Operation, ended: Ended, number: signal.Signals) -> None:
    """The command ended by the signal, or as if it had not come, or says that it was interrupted."""
    if "Traceback" in ended.err and "KeyboardInterrupt" not in ended.err:
        raise Broken(f"{operation.name}: {number.name}: a traceback: {ended.err.strip().splitlines()[-1][:200]}")
    if ended.code not in (0, -number, 128 + number) and not (operation.name == "save_pretrained" and ended.code == 1):
        last = ended.err.strip().splitlines()[-1:]
        raise Broken(f"{operation.name}: {number.name}: exit code {ended.code} {last}")


def _check_again(operation: Operation, case: Case, folder: Path) -> None:
    """The same command again leaves what an uninterrupted run leaves."""
    again = Running(operation.run(folder, case.material), folder, case.folder / "prints").wait()
    if again.code:
        raise Broken(f"{operation.name}: again: exit code {again.code}: {again.err.strip()[-300:]}")
    if fault := operation.same(
        folder / operation.target, _expected(case.material, operation) / "new" / operation.target
    ):
        raise Broken(f"{operation.name}: again: {fault}")
    names = {path.name for path in folder.iterdir()} - {operation.target, "prints"}
    if names := {name for name in names if not name.endswith(".lock")}:
        raise Broken(f"{operation.name}: leftovers after the next run: {sorted(names)}"[:300])


def _start(operation: Operation, case: Case, **options: Any) -> tuple[Path, Running]:
    folder = case.folder / "work"
    folder.mkdir()
    if operation.old is not None:
        shutil.copytree(_expected(case.material, operation) / "old", folder, dirs_exist_ok=True)
    return folder, Running(operation.run(folder, case.material), folder, case.folder / "prints", **options)


def before_a_call(case: Case, parameter: Sequence[Any]) -> None:
    """A signal before the n-th call that changes a file."""
    name, index, number = parameter[0], parameter[1], signal.Signals(parameter[2])
    operation = BY_NAME[name]
    case.note(f"{name}: {number.name} before call {index} on a file")
    folder, running = _start(operation, case, kill_before=index, number=number)
    _check_end(operation, running.wait(), number)
    _state(operation, folder, case.material)
    _check_again(operation, case, folder)


def at_a_moment(case: Case, parameter: Sequence[Any]) -> None:
    """A signal from outside, at a random moment."""
    name, number = parameter[0], signal.Signals(parameter[1])
    operation = BY_NAME[name]
    _, seconds = _uninterrupted(case.material, operation)
    moment = case.rng.random() * seconds * 1.1
    case.note(f"{name}: {number.name} after {moment:.3f} of {seconds:.3f} s")
    folder, running = _start(operation, case)
    time.sleep(moment)
    running.send(number)
    _check_end(operation, running.wait(), number)
    _state(operation, folder, case.material)
    _check_again(operation, case, folder)


def full_disk(case: Case, parameter: Sequence[Any]) -> None:
    """No file may grow past a size, as on a full disk: a clear error, and the old output stays."""
    (name,) = parameter
    operation = BY_NAME[name]
    limit = int(10 ** case.rng.uniform(0, 5.5))
    case.note(f"{name}: no file larger than {limit} bytes")
    folder = case.folder / "work"
    folder.mkdir()
    if operation.old is not None:
        shutil.copytree(_expected(case.material, operation) / "old", folder, dirs_exist_ok=True)
    run = operation.run(folder, case.material)

    def limited() -> Any:
        import resource

        sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return run()

    # What it prints would count too: only its errors are kept, and they are short.
    ended = Running(limited, folder, case.folder / "prints").wait()
    if ended.code < 0:
        raise Broken(f"{name}: ended by signal {-ended.code}")
    if ended.code and name != "save_pretrained" and limit > 1000:
        require_command_error(ended, name)
    _state(operation, folder, case.material)
    _check_again(operation, case, folder)


def two_writers(case: Case, parameter: Sequence[Any]) -> None:
    """The same command twice at once: each succeeds or says that the other is at work, and the output is right."""
    (name,) = parameter
    operation = BY_NAME[name]
    _, seconds = _uninterrupted(case.material, operation)
    case.note(f"{name} twice at once")
    folder, first = _start(operation, case)
    time.sleep(case.rng.random() * seconds * 0.8)
    second = Running(operation.run(folder, case.material), folder, case.folder / "prints 2")
    ends = [first.wait(), second.wait()]
    for ended in ends:
        if ended.code:
            require_command_error(ended, name)
    if all(ended.code for ended in ends):
        raise Broken(f"{name}: both writers failed: {ends[0].err.strip()[-200:]}")
    if _state(operation, folder, case.material) != "new":
        raise Broken(f"{name}: a writer succeeded, but the output is the old one")
    _check_again(operation, case, folder)


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def _before_calls(material: Path) -> Iterator[Sequence[Any]]:
    for operation in OPERATIONS:
        calls, _ = _uninterrupted(material, operation)
        for index in range(calls):
            for number in SIGNALS:
                yield operation.name, index, int(number)


def _moments(material: Path) -> list[Sequence[Any]]:
    for operation in OPERATIONS:
        _uninterrupted(material, operation)
    weights = {"pretrain": 6, "prepare": 4, "finetune": 4}
    return [
        (o.name, int(n)) for _ in range(40) for o in OPERATIONS for n in SIGNALS for _ in range(weights.get(o.name, 1))
    ]


def _each(material: Path) -> list[Sequence[Any]]:
    for operation in OPERATIONS:
        _uninterrupted(material, operation)
    return [(operation.name,) for _ in range(200) for operation in OPERATIONS]


def _each_run(material: Path) -> list[Sequence[Any]]:
    return [(name,) for (name,) in _each(material) if name in ("pretrain", "prepare", "finetune")]


ATTACKS = [
    Attack("kills", "before each call on a file", before_a_call, lambda m: list(_before_calls(m)), 5, 14, 90),
    Attack("kills", "at random moments", at_a_moment, _moments, 3, 8, 90),
    Attack("kills", "files that can't grow", full_disk, _each, 1, 5, 90),
    Attack("kills", "two writers", two_writers, _each_run, 1, 3, 90),
]
