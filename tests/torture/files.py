"""Attacks on files: bits flipped, bytes cut off, JSON values replaced, in every kind of file that the project reads.

What a checksum covers (checkpoints, prepared data) is detected, or an older checkpoint gives the same bits. What none
covers (a model folder of transformers, rows) gives another valid input or a clear error; a truncated tensor file, or
another header of one, is never read as something else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.torture import kills
from tests.torture.attack import Attack, Broken, Case
from tests.torture.material import prepare_command, pretrain_command
from tests.torture.process import Ended, Running, command, require_command_error

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**31, 2**63, 10**30, 1e9, 0.5, float("nan"), float("inf"), "", "x", "../x", "/tmp/x", [],
    [1], {}, {"a": 1}, [[[[]]]], "\ud800", "é" * 50,
)  # fmt: skip


def damage(path: Path, rng: Random) -> str:
    """Damage a file; returns how."""
    data = path.read_bytes()
    kinds = ["flip", "flip", "flip", "byte", "truncate", "truncate", "empty", "append", "zeros", "delete", "folder"]
    kinds += ["json"] * 6 if path.suffix in (".json", ".jsonl") else []
    kind = rng.choice(kinds)
    if not data and kind not in ("delete", "folder"):
        kind = "append"
    at = rng.randrange(max(len(data), 1))
    if kind == "flip":
        bit = rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        return f"bit {bit} of byte {at} of {len(data)} flipped"
    if kind == "byte":
        path.write_bytes(data[:at] + rng.randbytes(1) + data[at + 1 :])
    elif kind == "truncate":
        path.write_bytes(data[:at])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "append":
        path.write_bytes(data + rng.choice([b"\0", b"\n", b"x" * 100, b"\xff\xfe", b"{", data[:200]]))
    elif kind == "zeros":
        path.write_bytes(data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :])
    elif kind in ("delete", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        return _damage_json(path, data, rng)
    return f"{kind} at byte {at} of {len(data)}"


def _damage_json(path: Path, data: bytes, rng: Random) -> str:
    """Replace or delete one value of a JSON file, or of one line of a file of JSON lines."""
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
    index = rng.randrange(len(lines))
    root = {"": json.loads(lines[index])}
    node: Any = root
    key: Any = ""
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if key != "" and rng.random() < 0.3:
        del node[key]
        how = f"{key!r} deleted"
    else:
        node[key] = rng.choice(_VALUES)
        how = f"{key!r} = {node[key]!r}"[:80]
    lines[index] = json.dumps(root[""], indent=1 if path.suffix == ".json" else None)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"line {index + 1}: {how}" if path.suffix == ".jsonl" else how


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _damaged_copy(case: Case, source: str, name: str) -> tuple[Path, str]:
    """A copy of the material `source` with its file `name` damaged, and how."""
    folder = case.folder / "work"
    shutil.copytree(case.material / source, folder / source)
    how = damage(folder / source / name, case.rng)
    case.note(f"{source}/{name}: {how}")
    return folder, f"{source}/{name}: {how}"


def _run(case: Case, function: Callable[[], Any], number: int = 0, **options: Any) -> Ended:
    """Run a command that may change files below the case's folder only, with one gigabyte of memory."""
    ended = Running(function, case.folder, case.folder / f"prints{number}", memory=3 << 30, **options).wait(60)
    if ended.outside:
        raise Broken(f"it writes {ended.outside[0]}")
    return ended


def checkpoints(case: Case, name: str) -> None:
    """A run that resumes from damaged checkpoints, without its final model."""
    folder, how = _damaged_copy(case, "run", name)
    shutil.rmtree(folder / "run" / "final")
    if name.startswith("checkpoints") and case.rng.random() < 0.3:  # no older one is left
        newest = Path(name).parts[1]
        for other in (folder / "run" / "checkpoints").iterdir():
            if other.name != newest:
                shutil.rmtree(other)
    elif name.startswith("checkpoints/step-00000012") and case.rng.random() < 0.3:
        other = name.replace("step-00000012", "step-00000008")
        how += f"; {other}: {damage(folder / 'run' / other, case.rng)}"
        case.note(how)
    ended = _run(case, pretrain_command(folder / "run", case.material))
    if ended.code:
        return require_command_error(ended, name)
    log_is_damaged = name == "log.jsonl"
    same = kills._same_tree if log_is_damaged else kills._same_run
    pair = [root / "final" if log_is_damaged else root for root in (folder / "run", case.material / "run")]
    if fault := same(*pair):
        raise Broken(f"{name.split('/')[-1]}: resumed to something else: {fault}")


def prepared(case: Case, name: str) -> None:
    """A run of two steps on damaged data."""
    folder, _ = _damaged_copy(case, "data", name)
    changed = {"data.folder": folder / "data", "steps": 2, "eval_interval": 2, "checkpoint_interval": 0}
    expected = case.material / "two steps"
    ended = _run(case, pretrain_command(folder / "run", case.material, **changed))
    if ended.code:
        return require_command_error(ended, name)
    if fault := kills._same_run(folder / "run", expected):
        raise Broken(f"{name}: trains on damaged data: {fault}")


def _two_steps(material: Path) -> list[str]:
    """The files of the prepared folder; keeps what two steps on the undamaged ones give."""
    if not (material / "two steps").exists():
        changed = {"steps": 2, "eval_interval": 2, "checkpoint_interval": 0}
        ended = Running(
            pretrain_command(material / "two steps", material, **changed), material, material / "prints"
        ).wait()
        assert ended.code == 0, ended.err
    return _files(material / "data") * 40


def model_folder(case: Case, name: str) -> None:
    """Sentence vectors from a damaged folder of transformers."""
    data = (case.material / "base" / name).read_bytes()
    folder, how = _damaged_copy(case, "base", name)
    texts = ["a small bird sings.", "the old house"]
    ended = _run(case, command("embed", folder / "base", *texts, "--output", folder / "v.jsonl"))
    if ended.code:
        return require_command_error(ended, name)
    if name == "model.safetensors":
        header = 8 + int.from_bytes(data[:8], "little")
        path = folder / "base" / name
        now = path.read_bytes() if path.is_file() else b""
        vectors = [json.loads(line)["embedding"] for line in (folder / "v.jsonl").read_text().splitlines()]
        expected = json.loads((case.material / "vectors.json").read_text())
        if (now[:header] != data[:header] or len(now) != len(data)) and vectors != expected:
            raise Broken(f"{name}: another header is read as other weights: {how}")


def _model_files(material: Path) -> list[str]:
    if not (material / "vectors.json").exists():
        texts = ["a small bird sings.", "the old house"]
        run = command("embed", material / "base", *texts, "--output", material / "v.jsonl")
        ended = Running(run, material, material / "prints").wait()
        assert ended.code == 0, ended.err
        lines = (material / "v.jsonl").read_text().splitlines()
        (material / "vectors.json").write_text(json.dumps([json.loads(line)["embedding"] for line in lines]))
    return _files(material / "base") * 100


def result_folder(case: Case, name: str) -> None:
    """predict, evaluate, report and explain on a damaged result folder."""
    folder, _ = _damaged_copy(case, "tuned", name)
    target = folder / "tuned"
    what = case.rng.choice(["predict", "evaluate", "report"])
    if name in ("metrics.json", "finetune.json", "log.jsonl", "predictions.dev.jsonl"):
        what = "report"
    arguments: Sequence[object] = {
        "predict": (target, "a small bird", "it was very sad"),
        "evaluate": (target, case.material / "dev.csv"),
        "report": (target,),
    }[what]
    ended = _run(case, command(what, *arguments))
    if ended.code:
        require_command_error(ended, f"{what}, {name}")


def pretraining_report(case: Case, name: str) -> None:
    """report on the damaged log and settings of a pretraining run."""
    folder, _ = _damaged_copy(case, "run", name)
    ended = _run(case, command("report", folder / "run", "--output", folder / "report.html"))
    if ended.code:
        require_command_error(ended, name)


def _write_rows(folder: Path, suffix: str) -> Path:
    """A file of rows or documents of that kind."""
    import bz2
    import gzip
    import lzma

    texts = [
        "a small bird sings near the river.",
        "it was very sad and then quietly again",
        'the "old" house, red\ngreen',
    ] * 4
    rows = [{"text": text, "label": label} for text, label in zip(texts, ["good", "bad", "bad"] * 4, strict=True)]
    path = folder / f"rows{suffix}"
    plain = suffix.split(".")[1]
    lines = {
        "csv": "text,label\n" + "".join('"{}",{}\n'.format(r["text"].replace('"', '""'), r["label"]) for r in rows),
        "tsv": "text\tlabel\n" + "".join(f"{r['text'][:20]}\t{r['label']}\n" for r in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1),
        "txt": "\n\n".join(r["text"] for r in rows) + "\n",
        "parquet": "",
    }[plain].encode()
    if plain == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), path)
        return path
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(lines)
    path.write_bytes(packed)
    return path


def rows(case: Case, suffix: str) -> None:
    """predict on damaged rows."""
    folder = case.folder / "work"
    folder.mkdir()
    path = _written(case, folder, suffix)
    case.note(f"{path.name}: {damage(path, case.rng)}")
    ended = _run(case, command("predict", case.material / "tuned", "--file", path, "--empty", "drop"))
    if ended.code:
        require_command_error(ended, suffix)


def documents(case: Case, suffix: str) -> None:
    """prepare on a damaged file beside an undamaged one: it drops what it can't read, or says why not."""
    folder = case.folder / "work"
    folder.mkdir()
    path = _written(case, folder, suffix)
    case.note(f"{path.name}: {damage(path, case.rng)}")
    sources = f"[{path}, {case.material / 'corpus.txt'}]"
    run = prepare_command(folder / "data", path, sources=sources)
    ended = _run(case, run)
    if ended.code:
        require_command_error(ended, suffix)


def _written(case: Case, folder: Path, suffix: str) -> Path:
    """The undamaged file, made by a fork: Arrow's threads must not be forked."""
    ended = Running(lambda: _write_rows(folder, suffix) and None, case.folder, case.folder / "prints-w").wait()
    assert ended.code == 0, ended.err
    return folder / f"rows{suffix}"


def _run_files(material: Path) -> list[str]:
    names = [name for name in _files(material / "run") if not name.startswith("final/")]
    often = [name for name in names if name.endswith((".json", "log.jsonl")) or "step-00000012" in name]
    return (names + often * 3) * 20


def _import_in_parent(material: Path) -> None:
    """Import here what the commands import, so that the forks need not."""
    for name in ("pretrain", "prepare", "finetune", "predict p.csv", "embed v.npy", "evaluate --metrics"):
        kills._uninterrupted(material, kills.BY_NAME[name])


def _warm(parameters: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    def listed(material: Path) -> list[str]:
        _import_in_parent(material)
        return parameters(material)

    return listed


_ROWS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet")
_DOCUMENTS = (".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.bz2", ".csv.xz", ".jsonl.gz")

ATTACKS = [
    Attack("files", "checkpoints and settings of a run", checkpoints, _warm(_run_files), 4, 6, 90),
    Attack("files", "prepared data", prepared, _warm(_two_steps), 2, 5, 90),
    Attack("files", "model folder", model_folder, _warm(_model_files), 3, 8, 90),
    Attack("files", "result folder", result_folder, _warm(lambda m: _files(m / "tuned") * 100), 3, 6, 90),
    Attack(
        "files", "report of a run", pretraining_report, _warm(lambda m: ["log.jsonl", "pretrain.json"] * 200), 1, 3, 90
    ),
    Attack("files", "rows", rows, _warm(lambda m: list(_ROWS) * 100), 2, 6, 90),
    Attack("files", "documents", documents, _warm(lambda m: list(_DOCUMENTS) * 100), 2, 5, 90),
]
