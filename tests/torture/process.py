"""`bert-fast` commands and Python functions in forks of this process, watched and killed before any call on a file."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture.attack import Broken

# Audit events that change the file system: the index of each path among the arguments, and of its folder's descriptor.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)),  # also of os.replace
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: the exit code, or minus the signal's number.
        out, err: what it wrote.
        calls: number of calls that changed files below the watched folder.
        outside: paths outside the watched folder that it changed.
    """

    code: int
    out: str
    err: str
    calls: int
    outside: tuple[str, ...]


class Running:
    """A forked process that runs `function`, whose result is its exit code.

    Args:
        function: what to run; None counts as exit code 0.
        folder: watched: calls that change files below it are counted, others are reported as outside.
        scratch: a folder for what the process prints, neither watched nor outside.
        kill_before: the number of the call on a file before which the process sends itself `number`; None for never.
        memory: bytes that it may allocate more than this process has.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        folder: Path,
        scratch: Path,
        *,
        kill_before: int | None = None,
        number: signal.Signals = signal.SIGKILL,
        memory: int = 4 << 30,
        stdin: bytes = b"",
    ) -> None:
        scratch.mkdir(exist_ok=True)
        self.scratch = scratch
        (scratch / "in").write_bytes(stdin)
        self.pid = os.fork()
        if self.pid == 0:
            _run(function, folder, scratch, kill_before, number, memory)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> Ended:
        """How it ended; `Broken` if it does not within `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Broken(f"it hangs: {self._read('err')[-300:]}")
            time.sleep(0.002)
        events = self._read("events").splitlines()
        outside = tuple(line for line in events if line != "call")
        return Ended(
            os.waitstatus_to_exitcode(status), self._read("out"), self._read("err"), len(events) - len(outside), outside
        )

    def _read(self, name: str) -> str:
        path = self.scratch / name
        return path.read_text(errors="replace") if path.exists() else ""


def _run(
    function: Callable[[], Any],
    folder: Path,
    scratch: Path,
    kill_before: int | None,
    number: signal.Signals,
    memory: int,
) -> None:
    code = 70
    try:
        for name, descriptor in (("in", 0), ("out", 1), ("err", 2)):
            file = os.open(scratch / name, os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        # Under pytest sys.stdout is another file.
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", buffering=1, closefd=False) for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _limit(memory)
        _watch(folder, scratch, kill_before, number)
        result = function()
        code = 0 if result is None else int(result)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                file.flush()
        os._exit(code)


def _limit(memory: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(folder: Path, scratch: Path, kill_before: int | None, number: signal.Signals) -> None:
    """Count the calls that change files, and send the signal before one of them."""
    inside, ignored = os.path.realpath(folder), (os.path.realpath(scratch), "/dev/", "/proc/")
    caches = ("__pycache__", os.path.join(tempfile.gettempdir(), "tmp"), "/torchinductor")  # byte code, `tempfile`
    events = os.open(scratch / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    count = 0

    def on_change(path: Any, folder: int | None = None) -> bool:
        """Whether the path is below the watched folder."""
        if isinstance(path, int) or path is None:
            return False
        path = os.fsdecode(path)
        start = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and folder >= 0 else os.getcwd()
        name = os.path.join(os.path.realpath(os.path.join(start, os.path.dirname(path))), os.path.basename(path))
        if not name.startswith((inside, *ignored)) and not any(cache in name for cache in caches):
            os.write(events, name.encode("utf-8", "replace") + b"\n")
        return name.startswith(inside)

    def on_call() -> None:
        nonlocal count
        count += 1
        if count - 1 == kill_before:
            os.kill(os.getpid(), number)
        os.write(events, b"call\n")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags is not None and flags & _WRITES and on_change(path):
                on_call()
        elif event in _CHANGES:
            inside_paths = [on_change(args[i], None if j is None else args[j]) for i, j in _CHANGES[event]]
            if any(inside_paths):
                on_call()

    sys.addaudithook(hook)
    fsync = os.fsync

    def watched_fsync(descriptor: Any) -> None:
        on_call()
        fsync(descriptor)

    os.fsync = watched_fsync


def command(*arguments: object) -> Callable[[], int]:
    """A `bert-fast` command as a function."""

    def run() -> int:
        from bert_fast.cli.main import main

        return main([str(argument) for argument in arguments])

    return run


def settings(values: dict[str, Any]) -> list[str]:
    """Settings as arguments of a command."""
    return [f"--{name}={value}" for name, value in values.items()]


def require_command_error(ended: Ended, what: str, *, names: Sequence[str] = ()) -> None:
    """`Broken` unless a command that failed said why in one line of stderr, with one of `names` in it."""
    lines = [line for line in ended.err.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if "Traceback" in ended.err:
        raise Broken(f"{what}: a traceback: {last[:300]}")
    if ended.code != 2 or ": error: " not in last:
        raise Broken(f"{what}: exit code {ended.code}, last line {last[:300]!r}")
    if names and not any(name in last for name in names):
        raise Broken(f"{what}: the error names none of {', '.join(names)}: {last[:300]!r}")
