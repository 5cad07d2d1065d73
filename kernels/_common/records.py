"""Records of passing runs of `bert-fast verify --record`: what `auto` may choose on a GPU.

A record names the device, the versions, the commit and the errors of every case, and the hash of the sources that ran.
It counts as long as the op's sources are the same: a changed kernel is unverified until it ran again. For Triton a
record of any CUDA device counts. Records are part of the package (`bert_fast/verified/<device>.json`); those that a
user made are in the user's cache and count on that machine.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tokenize
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bert_fast._io import write_json
from bert_fast.kernels._common import extensions

RECORDED = ("triton", "cuda")  # the implementations that need a record; the others are tested wherever they run
_KERNELS = Path(__file__).resolve().parents[1]
_UNHEARD = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
_BLOCKS = (tokenize.INDENT, tokenize.DEDENT)


def package_folder() -> Path:
    """The records that come with the package."""
    spec = importlib.util.find_spec("bert_fast")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "verified"


def user_folder() -> Path:
    """The records of this user's machine: $XDG_CACHE_HOME/bert_fast/verified."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bert_fast" / "verified"


@functools.cache
def sources_hash(op: str, impl: str = "triton") -> str:
    """Hash of the sources that the op runs as `impl`, its own and the shared.

    Of Triton's, comments and blank lines don't count; the CUDA kernels' was noted when they were built.
    """
    if impl == "cuda":
        return str(extensions.build_report("_CUDA").get("sources", {}).get(op, "not built"))
    digest = hashlib.sha256()
    for path in sorted(
        [*_KERNELS.glob(f"{op}/triton.py"), *_KERNELS.glob(f"{op}/triton/*.py"), *_KERNELS.glob("_common/triton_*.py")]
    ):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type not in _UNHEARD:
                    # Whitespace inside a token is that of a docstring, or of an f-string, which Python 3.12 splits.
                    digest.update("".join(token.string.split()).encode())
                    digest.update(tokenize.tok_name[token.type].encode() if token.type in _BLOCKS else b"")
    return digest.hexdigest()[:16]


def why_unverified(op: str, impl: str) -> str:
    """Why no record allows `auto` to choose `impl`, or "" where one does."""
    outdated = []
    for folder in (package_folder(), user_folder()):
        for path in sorted(folder.glob("*.json")):
            record = read(path)
            entry = record["ops"].get(op, {}).get(impl)
            if entry and entry["sources"] == sources_hash(op, impl):
                return ""
            if entry:
                outdated.append(f"{record['device']}, commit {entry['commit']}")
    if outdated:
        return f"its sources have changed since the last passing run ({'; '.join(outdated)}): bert-fast verify --record"
    return "no passing run on a GPU is recorded: bert-fast verify --record makes one"


def write(
    device: str, capability: tuple[int, int], passed: Mapping[tuple[str, str], list[dict[str, Any]] | None]
) -> Path:
    """Add runs to the record of `device`, in one step; returns the file.

    Args:
        device: the GPU's name.
        capability: its compute capability.
        passed: for (op, impl) its cases, or None where one failed: then an older entry is struck out.
    """
    checkout = package_folder().parents[1]
    folder = package_folder() if (checkout / ".git").exists() else user_folder()
    path = folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    record = read(path) | {"device": device, "arch": f"sm_{capability[0]}{capability[1]}"}
    versions = {name: importlib.metadata.version(name) for name in ("bert_fast", "torch", "triton")}
    about = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": _commit(checkout), **versions}
    for (op, impl), cases in passed.items():
        impls = record["ops"].setdefault(op, {})
        impls.pop(impl, None)
        if cases is not None:
            impls[impl] = {"sources": sources_hash(op, impl), **about, "cases": cases}
    write_json(path, record, sort_keys=True)
    return path


def _commit(checkout: Path) -> str:
    """The commit of a checkout, "+changes" where the kernels differ from it; "release" where there is none."""
    if not (checkout / ".git").exists():
        return "release"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False).stdout

    changes = git("status", "--porcelain", "kernels", "csrc").strip()
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+changes" if changes else "")


def read(path: Path) -> dict[str, Any]:
    """A record file, or an empty one where there is none."""
    if not path.exists():
        return {"device": "", "ops": {}}
    record: dict[str, Any] = json.loads(path.read_text())
    return record
