"""The lock of an output: one holder at a time, released by any death, and a file system without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bert_fast import _lock

HOLD = """
import sys, time
from pathlib import Path
from bert_fast._lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def hold(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_holder_is_refused_and_told_who_is_the_first(tmp_path: Path) -> None:
    target = tmp_path / "run"
    process = hold(target)
    try:
        who = f"host {re.escape(os.uname().nodename)}, pid {process.pid}, since 20"
        with pytest.raises(_lock.OutputBusyError, match=rf"a.* run \({who}.*\) is at"), _lock.exclusive(target):
            pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "run"
    process = hold(target)
    process.send_signal(number)
    process.wait()
    assert _lock.lock_path(target).exists()
    with _lock.exclusive(target):
        assert json.loads(_lock.lock_path(target).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_refused(tmp_path: Path) -> None:
    errors = []

    def second() -> None:
        try:
            with _lock.exclusive(tmp_path / "run"):
                pass
        except _lock.OutputBusyError as error:
            errors.append(error)

    with _lock.exclusive(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_many_processes_one_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from bert_fast._lock import OutputBusyError, exclusive\n"
        "done, target = 0, Path(sys.argv[1])\n"
        "while done < 20:\n"
        "    try:\n"
        "        with exclusive(target):\n"
        "            with open(f'{target}.inside', 'x'): pass\n"  # fails if another one is inside
        "            Path(f'{target}.inside').unlink(); done += 1\n"
        "    except OutputBusyError: time.sleep(0.001)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({"host": os.uname().nodename, "pid": 2**22 + 1}, False),  # more than the largest process number
        ({"host": os.uname().nodename, "pid": 1}, True),
        ({"host": os.uname().nodename, "pid": os.getpid()}, False),  # the number of an earlier process
        ({"host": "elsewhere", "pid": 2**22 + 1}, True),
        ({}, False),
    ],
)
def test_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: dict[str, object], refused: bool
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    target = tmp_path / "run"
    _lock.lock_path(target).write_text(json.dumps(holder))
    if refused:
        with pytest.raises(_lock.OutputBusyError, match=f"pid {holder['pid']}"), _lock.exclusive(target):
            pass
        assert json.loads(_lock.lock_path(target).read_text()) == holder
    else:
        expected = pytest.raises(_lock.OutputBusyError, match=f"pid {os.getpid()}")
        with _lock.exclusive(target), expected, _lock.exclusive(target):
            pass


def test_a_folder_has_one_lock_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for inside in (False, True):
        with (
            _lock.exclusive(tmp_path / "disk", inside=inside),
            pytest.raises(_lock.OutputBusyError, match="link; wait"),
            _lock.exclusive(tmp_path / "link", inside=inside),
        ):
            pass


def test_a_lock_inside_needs_no_parent_that_is_writable(tmp_path: Path) -> None:
    with _lock.exclusive(tmp_path / "new" / "run", inside=True):
        assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == [".lock"]
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]
    assert list((tmp_path / "new").iterdir()) == [], "nothing was written"
    for _ in range(2):
        with _lock.exclusive(tmp_path / "new" / "run", inside=True):
            (tmp_path / "new" / "run" / "a").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["a"]


def test_what_is_no_lock_file_is_neither_followed_nor_overwritten(tmp_path: Path) -> None:
    target, victim = tmp_path / "run", tmp_path / "victim"
    target.mkdir()
    makers = (
        lambda path: path.symlink_to(victim),
        lambda path: path.symlink_to(tmp_path / "created"),
        lambda path: os.link(victim, path),
        lambda path: path.write_text("x" * 5000),
        lambda path: path.mkdir(),
        os.mkfifo,
    )
    for inside in (True, False):
        path = target / ".lock" if inside else _lock.lock_path(target)
        for make in makers:
            victim.write_text("of somebody else")
            make(path)
            lock = _lock.exclusive(target, inside=inside)
            with pytest.raises(OSError, match="is not a lock file") as raised, lock:
                pass
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            assert str(path) in str(raised.value)
            assert victim.read_text() == "of somebody else"
            assert not (tmp_path / "created").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    lock = _lock.exclusive(tmp_path / "run", inside=True)
    with pytest.raises(OSError, match="run is a file; expected a folder"), lock:
        pass
