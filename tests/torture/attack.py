"""An attack: cases that run one after another in a forked process, so that a crash or a hang ends one case alone.

A case returns if the program held: an output old or new and complete, a run resumed to the bit, a clear error in one
line, the right value. It raises `Broken` otherwise. A case that is ended by a signal, or takes longer than the attack's
timeout, is broken too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Broken(Exception):  # noqa: N818  (not an error of this program: what an attack found)
    """A promise does not hold; the message says which."""


@dataclass
class Case:
    """One case.

    Attributes:
        rng: a function of the seed, the attack and the case's number.
        material: what `tests.torture.material` built; read only.
        folder: an empty folder for this case.
        note: say what is about to run: it describes the case if the process dies.
    """

    rng: random.Random
    material: Path
    folder: Path
    note: Callable[[str], None]


@dataclass(frozen=True)
class Attack:
    """An attack.

    Args:
        area, name: the row of the table.
        run: runs (case, parameter) and raises `Broken`.
        parameters: (material) -> a list of JSON values, each of them a case; if it is or returns None, cases are
            endless, drawn by rng.
        share: weight of its time among the attacks of its area.
        quick: number of cases in `make test`.
        timeout: seconds after which a case hangs.
    """

    area: str
    name: str
    run: Callable[[Case, Any], None]
    parameters: Callable[[Path], Sequence[Any] | None] | None = None
    share: float = 1.0
    quick: int = 20
    timeout: float = 30.0


@dataclass
class Tally:
    """The result of an attack: number of cases tried and held, and one line for each kind of failure."""

    tried: int = 0
    held: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def run_attack(
    attack: Attack, material: Path, scratch: Path, *, seed: int, seconds: float, limit: int | None, only: int | None
) -> Tally:
    """Run the cases of `attack` until `seconds` have passed or `limit` cases were tried; `only` runs one case."""
    tally = Tally()
    deadline = time.monotonic() + seconds  # the parameters count: making them may run every command once
    numbers, parameters = _numbers(attack, material, seed, only)
    pending = iter(numbers)
    while (limit is None or tally.tried < limit) and (time.monotonic() < deadline or not tally.tried):
        rest = None if limit is None else limit - tally.tried
        if not _run_batch(attack, pending, parameters, material, scratch, seed, deadline, rest, tally):
            break
    return tally


def _numbers(attack: Attack, material: Path, seed: int, only: int | None) -> tuple[Iterator[int], Any]:
    """The numbers of the cases in the order in which they run, and the parameters if they are finite."""
    parameters = None if attack.parameters is None else attack.parameters(material)
    if only is not None:
        return iter([only]), parameters
    if parameters is None:
        return iter(range(10**9)), None
    order = list(range(len(parameters)))
    random.Random(seed).shuffle(order)
    return iter(order), parameters


def _run_batch(
    attack: Attack,
    pending: Iterator[int],
    parameters: Any,
    material: Path,
    scratch: Path,
    seed: int,
    deadline: float,
    limit: int | None,
    tally: Tally,
) -> bool:
    """Fork a process that runs cases until one of them ends it; False when there are no more cases.

    The parent names each case through a pipe, and reads what became of it through another.
    """
    orders = os.pipe()[::-1]  # (write, read)
    reports = os.pipe()
    log = scratch / "log"
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(orders[0])
        os.close(reports[0])
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        _serve(attack, parameters, material, scratch, seed, orders[1], reports[1])
    with contextlib.suppress(OSError):  # the child does it too: whoever is first
        os.setpgid(pid, pid)
    os.close(orders[1])
    os.close(reports[1])
    more = True
    try:
        count = 0
        while (limit is None or count < limit) and (time.monotonic() < deadline or not tally.tried):
            number = next(pending, None)
            if number is None:
                more = False
                break
            os.write(orders[0], f"{number}\n".encode())
            outcome, note = _read_outcome(reports[0], attack.timeout)
            count += 1
            tally.tried += 1
            if outcome == "held":
                tally.held += 1
                continue
            ended = outcome in ("died", "hang")
            if outcome == "hang":
                os.killpg(pid, signal.SIGKILL)
            if ended:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                pid = 0
                outcome = "hang" if outcome == "hang" else _describe_end(status, log)
            # The same failure of another size is the same failure.
            kind = "".join("#" if character.isdigit() else character for character in outcome)[:90]
            tally.failures.setdefault(kind, f"case {number}: {note}: {outcome}"[:700])
            if ended:
                break
        else:
            more = False
    finally:
        os.close(orders[0])
        os.close(reports[0])
        if pid:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return more


def _describe_end(status: int, log: Path) -> str:
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return f"{how} {' '.join(last)}".strip()


def _read_outcome(descriptor: int, timeout: float) -> tuple[str, str]:
    """("held" | "died" | "hang" | what broke, the last note of the case)."""
    note, data = "", b""
    end = time.monotonic() + timeout
    while True:
        if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
            return "hang", note
        block = os.read(descriptor, 1 << 16)
        if not block:
            return "died", note
        data += block
        *lines, data = data.split(b"\n")
        for line in lines:
            kind, text = json.loads(line)
            if kind == "note":
                note = text
            else:
                return text, note


def _serve(
    attack: Attack, parameters: Any, material: Path, scratch: Path, seed: int, orders: int, reports: int
) -> None:
    """The forked process: run each case that is named through `orders`."""
    try:
        with os.fdopen(orders) as lines:
            for line in iter(lines.readline, ""):
                number = int(line)
                folder = scratch / "case"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                rng = random.Random(f"{seed} {attack.area} {attack.name} {number}")

                def send(kind: str, text: str) -> None:
                    os.write(reports, json.dumps([kind, text[:3000]]).encode() + b"\n")

                case = Case(rng, material, folder, lambda text: send("note", text))
                try:
                    attack.run(case, None if parameters is None else parameters[number])
                    send("end", "held")
                except Broken as error:
                    send("end", str(error) or "broken")
                except BaseException as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    send("end", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")
    finally:
        os._exit(0)


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is removed at the end, in memory where the machine has /dev/shm and it has 2 GB free."""
    import tempfile

    shm = Path("/dev/shm")
    if parent is None and shm.is_dir() and shutil.disk_usage(shm).free > 2 * 2**30:
        parent = shm
    path = Path(tempfile.mkdtemp(prefix="bert-fast-torture-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear(error: BaseException) -> bool:
    """Whether `error` is one that a user is meant to see: its type, and a message of one line."""
    kinds = (ValueError, TypeError, OSError, ImportError)
    meant = isinstance(error, kinds) or type(error).__name__ in ("ImplUnavailableError", "TrainingDivergedError")
    text = str(error)
    return meant and not isinstance(error, UnicodeError) and 0 < len(text) <= 1500 and len(text.splitlines()) == 1


def require_clear(error: BaseException, what: str) -> None:
    """`Broken` unless `error` is `clear`."""
    if not clear(error):
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise Broken(f"{what}: unclear {type(error).__name__} at {where}: {str(error)[:200]!r}")


def announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
