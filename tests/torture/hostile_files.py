"""Attacks by files that somebody else made: code in disguise, names of other places, bombs, texts that are markup.

No code of a file runs (each carries a payload that would leave a mark), no file outside the folders given is written,
memory and time are bounded, and each ends in success or in one clear line.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.attack import Broken, Case
from tests.torture.material import prepare_command, pretrain_command
from tests.torture.process import Ended, Running, command, require_command_error

CASES: dict[str, Callable[[Case, Path], None]] = {}
MEMORY = 1500 << 20


def hostile(function: Callable[[Case, Path], None]) -> Callable[[Case, Path], None]:
    """Register a case: (case, an empty folder to work in)."""
    CASES[function.__name__.replace("_", " ").strip()] = function
    return function


class _Payload:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def attempt(case: Case, function: Callable[[], Any], what: str, *, fails: bool | None = None, **options: Any) -> Ended:
    """Run a command on hostile files; `fails`: whether it must fail, None if both are right."""
    number = len(list(case.folder.glob("prints*")))
    ended = Running(
        function, case.folder / "work", case.folder / f"prints{number}", **{"memory": MEMORY, **options}
    ).wait(60)
    if ended.outside:
        raise Broken(f"{what}: it writes {ended.outside[0]}")
    if (case.folder / "work" / "mark").exists() or (case.folder / "mark").exists():
        raise Broken(f"{what}: code of the file ran")
    if ended.code < 0:
        raise Broken(f"{what}: ended by signal {-ended.code}: {ended.err.strip()[-200:]}")
    # JSON in a pipe holds U+009B as it is.
    for stream, controls in ((ended.out, "\x1b\x07"), (ended.err, "\x1b\x07\x9b")):
        if any(control in stream for control in controls):
            raise Broken(f"{what}: prints control characters: {stream[-200:]!r}")
    if ended.code:
        require_command_error(ended, what)
    if fails is not None and fails != bool(ended.code):
        raise Broken(f"{what}: exit code {ended.code}: {(ended.err or ended.out).strip()[-200:]}")
    return ended


def base(case: Case, folder: Path) -> Path:
    return Path(shutil.copytree(case.material / "base", folder / "base"))


def embed(case: Case, model: Path, what: str, **options: Any) -> Ended:
    return attempt(case, command("embed", model, "a small bird"), what, **options)


@hostile
def pickle_as_weights(case: Case, folder: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt", "config.json"):
        model = base(case, folder)
        if name == "pytorch_model.bin":
            (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(_Payload(folder / "mark")))
        embed(case, model, f"a pickle named {name}", fails=True)
        shutil.rmtree(model)


@hostile
def index_that_names_a_pickle(case: Case, folder: Path) -> None:
    for part in ("pytorch_model-00001.bin", "weights.pt", "x.safetensors"):
        model = base(case, folder)
        (model / "model.safetensors").unlink()
        (model / part).write_bytes(pickle.dumps({"a": _Payload(folder / "mark")}))
        index = {"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": part}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        embed(case, model, f"an index that names {part}", fails=True)
        shutil.rmtree(model)


@hostile
def index_that_names_other_places(case: Case, folder: Path) -> None:
    shutil.copy(case.material / "base" / "model.safetensors", folder / "outside.safetensors")
    for part in (
        "../outside.safetensors",
        str(folder / "outside.safetensors"),
        "a/../../outside.safetensors",
        "",
        ".",
        7,
        None,
    ):
        model = base(case, folder)
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": part}}))
        embed(case, model, f"an index that names {part!r}", fails=True)
        shutil.rmtree(model)


@hostile
def pickle_in_a_checkpoint(case: Case, folder: Path) -> None:
    import hashlib

    shutil.copytree(case.material / "run", folder / "run")
    shutil.rmtree(folder / "run" / "final")
    newest = folder / "run" / "checkpoints" / "step-00000012"
    for name in ("training_state.safetensors", "model.safetensors", "trainer_state.json"):
        data = pickle.dumps(_Payload(folder / "mark"))
        (newest / name).write_bytes(data)
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        attempt(
            case,
            pretrain_command(folder / "run", case.material),
            f"a checkpoint whose {name} is a pickle",
            memory=4 << 30,
        )


@hostile
def manifest_that_names_other_places(case: Case, folder: Path) -> None:
    """A prepared folder at a URL, in fsspec's memory: its files are copied into a cache."""
    for name in ("../../mark2", str(folder / "mark2"), "train/../../../mark2", "", "a\0b", "train", "train/../x"):
        shutil.rmtree(folder / "data", ignore_errors=True)
        shutil.copytree(case.material / "data", folder / "data")
        manifest = json.loads((folder / "data" / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"]["vocab.txt"]
        (folder / "data" / "manifest.json").write_text(json.dumps(manifest))

        def run(name: str = name) -> int:
            import fsspec

            files = fsspec.filesystem("memory")
            for path in (folder / "data").rglob("*"):
                if path.is_file():
                    files.pipe_file(f"/data/{path.relative_to(folder / 'data')}", path.read_bytes())
            with_name = os.path.normpath(f"/data/{name}") if "\0" not in name else "/data/x"
            files.pipe_file(with_name, (folder / "data" / "vocab.txt").read_bytes())
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache" / "deep")
            return int(
                pretrain_command(folder / "run", case.material, **{"data.folder": "memory://data", "steps": 1})()
            )

        attempt(case, run, f"a manifest that names {name!r}", fails=True, memory=4 << 30)
        stray = list(folder.rglob("*mark2*"))
        if stray:
            raise Broken(f"a manifest that names {name!r} writes {stray[0]}")


@hostile
def checkpoint_manifest_that_names_other_places(case: Case, folder: Path) -> None:
    for name in ("../../../secret", "/etc/passwd"):
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(case.material / "run", folder / "run")
        shutil.rmtree(folder / "run" / "final")
        path = folder / "run" / "checkpoints" / "step-00000012" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        path.write_text(json.dumps(manifest))
        attempt(
            case, pretrain_command(folder / "run", case.material), f"a checkpoint that names {name}", memory=4 << 30
        )


@hostile
def data_set_that_names_other_places(case: Case, folder: Path) -> None:
    import pyarrow as pa

    for name in ("../outside.arrow", str(folder / "outside.arrow"), 3, None):
        shutil.rmtree(folder / "set", ignore_errors=True)
        (folder / "set").mkdir()

        def write() -> None:
            table = pa.table({"text": ["secret"], "label": ["x"]})
            with pa.ipc.new_stream(folder / "outside.arrow", table.schema) as writer:
                writer.write_table(table)

        Running(write, folder, case.folder / "prints-w").wait()
        state = {"_data_files": [{"filename": name}], "_fingerprint": "x", "_format_type": None}
        (folder / "set" / "state.json").write_text(json.dumps(state))
        (folder / "set" / "dataset_info.json").write_text("{}")
        ended = attempt(
            case,
            command("predict", case.material / "tuned", "--file", folder / "set"),
            f"a data set that names {name!r}",
        )
        if "secret" in ended.out:
            raise Broken(f"a data set that names {name!r} is read from there")


_CLASSES = (
    "class_path: os.mkdir\ninit_args: {path: MARK}",
    "class_path: subprocess.Popen\ninit_args:\n  args: [mkdir, MARK]",
    "class_path: bert_mark.Mark",
    "!!python/object/apply:os.mkdir [MARK]",
    "!!python/object/new:os.mkdir [MARK]",
    "!!python/name:bert_mark.Mark",
    "{class_path: bert_mark.Mark, dict_kwargs: {}}",
)


@hostile
def yaml_that_names_classes(case: Case, folder: Path) -> None:
    """As the value of settings in --config files; the module that it names leaves a mark when it is imported."""
    (folder / "lib").mkdir()
    (folder / "lib" / "bert_mark.py").write_text(f"import os\nos.mkdir({str(folder / 'mark')!r})\nclass Mark: pass\n")
    keys = {
        "pretrain": ("model", "optimizer", "data", "output_dir", "steps"),
        "finetune": ("options", "data", "loss", "batch", "task"),
        "prepare": ("sources", "output", "vocab"),
        "multitask": ("tasks", "text"),
    }
    name = case.rng.choice(sorted(keys))
    key, text = case.rng.choice(keys[name]), case.rng.choice(_CLASSES).replace("MARK", str(folder / "mark"))
    body = text if text.startswith(("!", "{")) else "\n  " + text.replace("\n", "\n  ")
    (folder / "c.yaml").write_text(f"{key}: {body}\n")
    words: list[object] = [name, "--config", folder / "c.yaml"]
    if case.rng.random() < 0.4:
        value = json.dumps({"class_path": "bert_mark.Mark", "init_args": {}})
        on_command_line: list[list[object]] = [
            ["finetune", "classification", f"--options={value}", "--model", "x", "--output_dir", folder / "o"],
            ["predict", case.material / "tuned", "a", f"--options={value}"],
            ["pretrain", f"--{key if name == 'pretrain' else 'model'}={value}", "--output_dir", folder / "o"],
        ]
        words, text = case.rng.choice(on_command_line), ""
    what = f"{' '.join(map(str, words))[:150]} {text[:60]!r}"
    case.note(what)
    run = command(*words)

    def with_path() -> Any:
        import sys

        sys.path.insert(0, str(folder / "lib"))
        return run()

    attempt(case, with_path, what.replace(str(folder), ""), fails=True)


@hostile
def yaml_aliases(case: Case, folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (folder / "c.yaml").write_text("\n".join(lines) + "\nsources: *a9\n")
    attempt(
        case, command("prepare", "--config", folder / "c.yaml", "--output", folder / "o"), "YAML aliases", fails=True
    )


@hostile
def compressed_bombs(case: Case, folder: Path) -> None:
    """A line of 400 MB in 400 kB, and a hundred files of it in each other's neighbourhood."""
    for name, data in (
        ("a.jsonl.gz", b'{"text": "' + b"a" * 400_000_000),
        ("a.txt.gz", b"\0" * 400_000_000),
        ("b.txt.gz", b"a " * 2**27),
    ):
        path = folder / name
        path.write_bytes(gzip.compress(data, 1))
        del data
        run = prepare_command(
            folder / "data", path, sources=f"[{path}, {case.material / 'corpus.txt'}]", overwrite="true"
        )
        attempt(case, run, f"a bomb {name}")
        path.unlink()


@hostile
def symbolic_links(case: Case, folder: Path) -> None:
    """Loops, and links to the folder itself, must not multiply a corpus."""
    corpus = folder / "corpus"
    corpus.mkdir()
    shutil.copy(case.material / "corpus.txt", corpus / "a.txt")
    for index in range(3):
        (corpus / f"loop{index}").symlink_to(corpus, target_is_directory=True)
    (corpus / "b.txt").symlink_to(corpus / "a.txt")
    (corpus / "c.txt").symlink_to(corpus / "c.txt")
    (corpus / "broken.txt").symlink_to(corpus / "nothing")
    for source in (str(corpus), str(corpus / "**" / "*.txt")):
        run = prepare_command(folder / "data", corpus, sources=json.dumps([source]), overwrite="true")
        ended = attempt(case, run, f"links, {source}")
        if not ended.code:
            splits = json.loads((folder / "data" / "manifest.json").read_text())["splits"]
            documents = sum(split["documents"] for split in splits.values())
            if documents != 40:
                raise Broken(f"links, {source[-12:]}: {documents} documents of 40")


@hostile
def tensor_file_headers(case: Case, folder: Path) -> None:
    header = {
        "a length of 2^63": struct.pack("<Q", 2**63),
        "a length of 99 MB": struct.pack("<Q", 99_000_000) + b"{}",
        "no JSON": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
        "deep JSON": struct.pack("<Q", 90_000) + b"[" * 90_000,
        "a shape of 1e9": _header({"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}) + b"\0" * 4,
        "overlap": _header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + b"\0" * 4,
        "another dtype": _header({"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}) + b"\0" * 8,
        "nothing": b"",
        "no tensors": _header({}),
    }
    for name, data in header.items():
        model = base(case, folder)
        (model / "model.safetensors").write_bytes(data)
        embed(case, model, f"a header: {name}", fails=True)
        shutil.rmtree(model)


def _header(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text
