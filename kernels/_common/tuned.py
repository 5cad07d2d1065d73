"""The times that `bert-fast tune` measured on this device, by which `impl="auto"` chooses here.

One file a device, `$XDG_CACHE_HOME/bert_fast/tuned/<device>.json`, with the times of each implementation that was
verified in the run that measured it, and the hash of its source. It counts while torch, the build of bert_fast and the
CPU's features are the same, and an entry while its implementation has the same source.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import platform
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bert_fast._io import check_fields, read_json
from bert_fast.kernels._common import extensions, records
from bert_fast.kernels._common.times import Time, from_entry

SCHEMA = "bert_fast.tuned/1"
DEVICES = ("cpu", "cuda")


class Entry(NamedTuple):
    """What a table has of one implementation: the hash of its source, the dtypes verified, and the times."""

    source: str
    dtypes: tuple[str, ...]
    times: list[Time]


class Table(NamedTuple):
    """The entries by op and implementation, and why others of the file don't count."""

    ops: Mapping[str, Mapping[str, Entry]]
    ignored: tuple[str, ...]


EMPTY = Table({}, ())


def device_label(device: str) -> str:
    """The name of the current device of a type: the GPU's, or "cpu" and the processor's."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {processor()}"


def processor() -> str:
    """The processor's name, or its architecture where the system doesn't say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1]
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    """The CPU features detected by the CPU kernels, or by torch if they are not built."""
    try:
        _C = importlib.import_module("bert_fast._C")

        return f"{_C.cpu_isa()} (bert_fast kernels)"
    except (ImportError, AttributeError):
        return f"{torch.backends.cpu.get_cpu_capability()} (torch)"


def path_of(label: str) -> Path:
    """The file of the device of this name."""
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return records.user_folder().parent / "tuned" / f"{name}.json"


def environment() -> dict[str, str]:
    """What the times of a table depend on, besides the device and the implementations' sources."""
    return {"torch": torch.__version__, "build": _build(), "cpu_features": cpu_features()}


@functools.cache
def _build() -> str:
    """Hash of the compiled kernels."""
    digest = hashlib.sha256()
    for path in sorted(records.package_folder().parent.glob("_C*.so")) + sorted(
        records.package_folder().parent.glob("_CUDA*.so")
    ):
        digest.update(path.name.encode() + path.read_bytes())
    report = [extensions.build_report(name).get("built") for name in ("_C", "_CUDA")]
    return f"{digest.hexdigest()[:16]} {report}"


def read(device: str) -> Table:
    """The table of a device type in the user's cache, whatever is in the file; `ignored` says what does not count."""
    try:
        label = device_label(device)
        path = path_of(label)
        if not path.exists():
            return EMPTY
        values = read_json(path, {"schema": str, "device": str, "environment": dict, "ops": dict})
        if values["schema"] != SCHEMA:
            return Table({}, (f"{path} has the schema {values['schema']!r}; expected {SCHEMA!r}",))
        if values["device"] != label:
            return Table({}, (f"{path} is of {values['device']!r}, and this device is {label!r}",))
        now = environment()
        changed = [name for name in now if values["environment"].get(name) != now[name]]
        if changed:
            return Table({}, (f"{path} was measured with another {', '.join(changed)}: bert-fast tune measures again",))
        return Table({op: {impl: _entry(path, op, impl, entry) for impl, entry in impls.items()}
                      for op, impls in values["ops"].items()}, ())  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        return Table({}, (f"the table of bert-fast tune can't be read: {error}",))


def _entry(path: Path, op: str, impl: str, entry: Any) -> Entry:
    where = f"{path}: {op} {impl}"
    check_fields(entry, {"source": str, "dtypes": list, "times": list}, where)
    measured = [from_entry(time) for time in entry["times"]]
    for time in measured:
        numbers = (*time.size.amounts, *time.size.exact)
        if len(time.size.exact) != 2 or not all(type(number) is int for number in numbers):
            raise ValueError(f"{where}: {time.size} is no size")
        if not (math.isfinite(time.ms) and time.ms > 0):
            raise ValueError(f"{where}: a time of {time.ms} ms")
    return Entry(entry["source"], tuple(map(str, entry["dtypes"])), measured)


def as_json(label: str, ops: Mapping[str, Mapping[str, Entry]], about: Mapping[str, Any]) -> dict[str, Any]:
    """A table as its file has it; `about` are fields of the run."""
    return {
        "schema": SCHEMA,
        "device": label,
        "environment": {**about, **environment()},
        "ops": {
            op: {
                impl: {
                    "source": entry.source,
                    "dtypes": list(entry.dtypes),
                    "times": [time.entry() for time in entry.times],
                }
                for impl, entry in impls.items()
            }
            for op, impls in ops.items()
        },
    }


def source_hash(functions: Sequence[Callable[..., Any]]) -> str:
    """Hash of the files that define functions, or of their code where they have no file; "" where neither exists."""
    digest = hashlib.sha256()
    for function in functions:
        function = inspect.unwrap(getattr(function, "func", function))  # of a functools.partial
        code = getattr(function, "__code__", None)
        file = _file_of(function)
        if file is None and code is None:
            return ""
        digest.update(str(getattr(function, "__qualname__", type(function).__qualname__)).encode())
        digest.update(_code(code).encode() if file is None else file.read_bytes())  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def _file_of(function: Any) -> Path | None:
    owner = function if inspect.isroutine(function) else type(function)
    try:
        name = inspect.getsourcefile(owner)
    except TypeError:  # a function of C
        name = getattr(sys.modules.get(getattr(owner, "__module__", None) or ""), "__file__", None)
    return Path(name) if name and Path(name).is_file() else None


def _code(code: types.CodeType) -> str:
    constants = [_code(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
