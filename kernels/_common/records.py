"""Records of passing runs of `bert-fast verify --record`, which allow `impl="auto"` to choose GPU kernels, and of their
times, which let it choose the faster one.

A record has the device, the versions, the commit, the errors of every case and the hash of the sources that ran. It is
valid while the op's sources are the same: a changed kernel is unverified until it passes again. A record of a device
is valid for all GPUs with the same matrix instructions, since tiles and kernels differ between these families; times
count on the device that they were measured on alone. Records are part of the package
(`bert_fast/verified/<device>.json`); a user's own are in the user's cache, for that machine.
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
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast._io import write_json
from bert_fast.kernels._common import extensions
from bert_fast.kernels._common import times as recorded_times
from bert_fast.kernels._common.times import Time

RECORDED = ("triton", "cuda")  # the implementations that need a record; tests cover the others wherever they run
_KERNELS = Path(__file__).resolve().parents[1]
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
_INDENTATION = (tokenize.INDENT, tokenize.DEDENT)


def package_folder() -> Path:
    """The folder of the records in the package."""
    spec = importlib.util.find_spec("bert_fast")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "verified"


def user_folder() -> Path:
    """The folder of the user's own records: $XDG_CACHE_HOME/bert_fast/verified."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bert_fast" / "verified"


@functools.cache
def sources_hash(op: str, impl: str = "triton") -> str:
    """Hash of the sources of the op's kernels, its own and the shared ones.

    Comments and blank lines of Triton sources don't count; the hash of CUDA sources is that of the build.
    """
    if impl == "cuda":
        return str(extensions.build_report("_CUDA").get("sources", {}).get(op, "not built"))
    digest = hashlib.sha256()
    for path in sorted(
        [*_KERNELS.glob(f"{op}/triton.py"), *_KERNELS.glob(f"{op}/triton/*.py"), *_KERNELS.glob("_common/triton_*.py")]
    ):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type not in _IGNORED:
                    # Only strings have whitespace inside: docstrings, and f-strings, which Python 3.12 splits.
                    digest.update("".join(token.string.split()).encode())
                    digest.update(tokenize.tok_name[token.type].encode() if token.type in _INDENTATION else b"")
    return digest.hexdigest()[:16]


def family(major: int) -> int:
    """The matrix instructions of a GPU of compute capability `major`, by the capability that introduced them.

    Returns:
        90: wgmma (Hopper); 100: tcgen05, with accumulators in a memory of their own (10.x and 11.x); 80: mma.sync, of
        every other GPU: Ampere, Ada and the Blackwells of 12.x.
    """
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


class Verified(NamedTuple):
    """The families of GPUs (see `family`) on which a valid record allows `auto` to choose an implementation, and the
    reason where there is none."""

    families: frozenset[int]
    reason: str


def verified(op: str, impl: str) -> Verified:
    """What the records say of `impl`, in the package and in the user's cache."""
    outdated, families = [], set()
    for folder in (package_folder(), user_folder()):
        for path in sorted(folder.glob("*.json")):
            record = read(path)
            entry = record["ops"].get(op, {}).get(impl)
            if entry and entry["sources"] == sources_hash(op, impl):
                families.add(family(int(record["arch"].removeprefix("sm_")) // 10))
            elif entry:
                outdated.append(f"{record['device']}, commit {entry['commit']}")
    return Verified(frozenset(families), "" if families else _why_not(outdated))


def _why_not(outdated: Sequence[str]) -> str:
    if outdated:
        return f"its sources have changed since the last passing run ({'; '.join(outdated)}): bert-fast verify --record"
    return "no passing run on a GPU is recorded: bert-fast verify --record makes one"


def write(
    device: str, capability: tuple[int, int], passed: Mapping[tuple[str, str], list[dict[str, Any]] | None]
) -> Path:
    """Add runs to the record of `device`, atomically; returns the file.

    Args:
        device: the GPU's name.
        capability: its compute capability.
        passed: the cases of each (op, impl), or None where one failed, which removes an older entry.
    """
    checkout = package_folder().parents[1]
    path = _file(device, package_folder() if (checkout / ".git").exists() else user_folder())
    record = read(path) | {"device": device, "arch": f"sm_{capability[0]}{capability[1]}"}
    versions = {name: importlib.metadata.version(name) for name in ("bert_fast", "torch", "triton")}
    about = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": _commit(checkout), **versions}
    for (op, impl), cases in passed.items():
        impls = record["ops"].setdefault(op, {})
        old = impls.pop(impl, {})
        if cases is not None:
            impls[impl] = {"sources": sources_hash(op, impl), **about, "cases": cases}
            if "times" in old and old["sources"] == impls[impl]["sources"]:
                impls[impl]["times"] = old["times"]
    write_json(path, record, sort_keys=True)
    return path


def write_times(device: str, op: str, impl: str, new: Sequence[Time]) -> Path | None:
    """Add times to the record of `device`, atomically, beside the run that verified the same sources.

    Returns:
        The file; None where no record of this device verifies these sources.
    """
    for folder in (user_folder(), package_folder()):
        path = _file(device, folder)
        record = read(path)
        entry = record["ops"].get(op, {}).get(impl)
        if entry and entry["sources"] == sources_hash(op, impl):
            old = [recorded_times.from_entry(time) for time in entry.get("times", [])]
            entry["times"] = [time.entry() for time in recorded_times.merge(old, new)]
            write_json(path, record, sort_keys=True)
            return path
    return None


def times(device: str, op: str, impl: str) -> list[Time]:
    """The times of exactly these sources on `device`; the user's own precede the package's."""
    found: list[Time] = []
    for folder in (package_folder(), user_folder()):
        entry = read(_file(device, folder))["ops"].get(op, {}).get(impl, {})
        if entry.get("sources") == sources_hash(op, impl):
            found = recorded_times.merge(found, [recorded_times.from_entry(time) for time in entry.get("times", [])])
    return found


def _file(device: str, folder: Path) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def _commit(checkout: Path) -> str:
    """The commit of a checkout, with "+changes" where the kernels differ from it; without one BERT_FAST_COMMIT, else
    "release"."""
    if not (checkout / ".git").exists():
        return os.environ.get("BERT_FAST_COMMIT", "release")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False).stdout

    changes = git("status", "--porcelain", "kernels", "csrc").strip()
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+changes" if changes else "")


def read(path: Path) -> dict[str, Any]:
    """The record in a file, or an empty one where there is no file; one of an older version has no "ops" that count."""
    empty: dict[str, Any] = {"device": "", "ops": {}}
    return empty | json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
