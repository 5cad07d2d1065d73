"""Atomic files and folders: after an exception, a kill or a refusal the old or the new target is complete."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bert_fast import _io
from tests.folders import NEW, OLD, contents, fill, old_folder


def write(target: Path, *, overwrite: bool = True, meanwhile: Callable[[], None] = lambda: None) -> None:
    with _io.atomic_folder(target, overwrite=overwrite) as folder:
        fill(folder)
        meanwhile()


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_a_folder_is_written_with_nothing_else_left(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "parent" / "result"
    if exists:
        target.parent.mkdir()
        old_folder(target)
    write(target)
    assert contents(target) == NEW
    assert list(target.parent.iterdir()) == [target]


def test_a_file_is_written_with_nothing_else_left(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "result.json"
    for values in ({"old": 1}, {"b": "ü", "a": [Path("x")]}):
        _io.write_json(target, values, sort_keys=True)
    assert target.read_text(encoding="utf-8") == '{\n "a": [\n  "x"\n ],\n "b": "ü"\n}\n'
    assert list(target.parent.iterdir()) == [target]


def test_an_exception_in_the_block_keeps_the_old_target(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    old_folder(folder)
    file.write_text("old")

    def fail_half_way(writer: AbstractContextManager[Path], name: str) -> None:
        with writer as temporary:
            (temporary / name).write_text("half")
            raise RuntimeError("half way")

    for writer, name in ((_io.atomic_folder(folder, overwrite=True), "a"), (_io.atomic_file(file), "")):
        with pytest.raises(RuntimeError, match="half way"):
            fail_half_way(writer, name)
    assert contents(folder) == OLD
    assert file.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [file, folder]


# The steps of a replacement, in order, and how many of them leave the old folder.
EXCHANGE = ["fsync_tree", "exchange", "fsync", "remove"], 2
TWO_RENAMES = ["fsync_tree", "rename", "rename", "fsync", "remove"], 3


@pytest.mark.parametrize(
    ("way", "step"), [(way, step) for way in (EXCHANGE, TWO_RENAMES) for step in range(len(way[0]))]
)
def test_an_error_at_any_step_leaves_a_complete_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[list[str], int], step: int
) -> None:
    steps, old = way
    target = tmp_path / "result"
    old_folder(target)
    calls: list[str] = []

    def failing(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == step + 1:
                raise OSError(f"{name} failed")
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(_io, "fsync_tree", failing("fsync_tree", lambda _: None))
    monkeypatch.setattr(_io, "fsync", failing("fsync", _io.fsync))
    monkeypatch.setattr(_io, "remove", failing("remove", _io.remove))
    monkeypatch.setattr(Path, "rename", failing("rename", Path.rename))
    if way is TWO_RENAMES:
        monkeypatch.setattr(_io, "_exchange", lambda *_: False)
    else:
        monkeypatch.setattr(_io, "_exchange", failing("exchange", _io._exchange))
    with pytest.raises(OSError, match=f"{steps[step]} failed"):
        write(target)
    assert calls[: step + 1] == steps[: step + 1]
    assert contents(target) == (OLD if step < old else NEW)
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_an_error_at_any_step_leaves_a_complete_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    for owner, name in ((_io, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(OSError, match="no space left"):
                _io.write_text(target, "new")
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]


# The module is loaded from its file, since importing bert_fast imports torch.
KILLED = """
import importlib.util, os, shutil, signal
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {module!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
calls = 0
def killing(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
Path.rename, Path.replace, shutil.rmtree = map(killing, (Path.rename, Path.replace, shutil.rmtree))
atomic._exchange = killing(atomic._exchange) if {exchange} else lambda *_: False
target = Path({target!r})
if {file}:
    atomic.write_text(target, "new")
else:
    with atomic.atomic_folder(target, overwrite=True) as folder:
        (folder / "a").write_text("new a")
"""


def killed(target: Path, kill_at: int, *, file: bool = False, exchange: bool = False) -> None:
    """Write `target` in a process that is killed before its rename, replace, exchange or rmtree number `kill_at`."""
    code = KILLED.format(module=_io.__file__, kill_at=kill_at, target=str(target), file=file, exchange=exchange)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kill_at", [1, 2, 3], ids=["move-aside", "rename", "delete"])
def test_after_a_kill_the_old_or_the_new_folder_is_complete(tmp_path: Path, kill_at: int) -> None:
    target = tmp_path / "result"
    old_folder(target)
    killed(target, kill_at)
    assert target.exists() == (kill_at != 2), "between the two renames no folder has the name"
    _io.recover(tmp_path)
    assert contents(target) == ({"a": "new a"} if kill_at == 3 else OLD)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kill_at", [1, 2], ids=["exchange", "delete"])
def test_an_exchanged_folder_has_its_name_at_every_moment(tmp_path: Path, kill_at: int) -> None:
    target = tmp_path / "result"
    old_folder(target)
    killed(target, kill_at, exchange=True)
    complete = OLD if kill_at == 1 else {"a": "new a"}
    assert contents(target) == complete
    _io.recover(tmp_path)
    assert contents(target) == complete
    assert list(tmp_path.iterdir()) == [target]


def test_after_a_kill_the_old_file_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_text("old")
    killed(target, 1, file=True)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    _io.recover(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_the_next_writer_recovers_what_a_killed_one_left(tmp_path: Path) -> None:
    target = tmp_path / "result"
    old_folder(target)
    killed(target, 2)
    with pytest.raises(FileExistsError, match="result exists"):
        write(target, overwrite=False)
    assert contents(target) == OLD
    killed(target, 2)
    write(target)
    assert contents(target) == NEW
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_processes_that_may_live_are_kept_except_folders_of_an_exclusive_writer(tmp_path: Path) -> None:
    target = tmp_path / "result"
    live, live_file = _io.temporary_path(target), _io.temporary_path(target)
    other_host = live.with_name(live.name.replace(_io._HOST, "00000000").replace(f"-{os.getpid()}-", "-4194305-"))
    others = [tmp_path / name for name in (".result.tmp", ".hidden", ".result.12-34.tmp")]
    for folder in (live, other_host, *others):
        folder.mkdir()
    live_file.touch()
    write(target)
    assert sorted(tmp_path.iterdir()) == sorted([target, live, live_file, other_host, *others])
    _io.recover(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([target, live, live_file, *others])
    _io.recover(tmp_path / "absent")


def test_a_writer_of_a_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    target, other = tmp_path / "result", tmp_path / "other"
    for path in (target, other):
        path.write_text("old")
        killed(path, 1, file=True)
    assert len(list(tmp_path.iterdir())) == 4
    _io.write_text(target, "new")
    assert len(list(tmp_path.iterdir())) == 3
    assert target.read_text() == "new"


def test_an_existing_target_is_refused_before_the_block_and_after_it(tmp_path: Path) -> None:
    target = tmp_path / "result"
    message = "result exists; choose another folder, or give --overwrite true"
    with pytest.raises(FileExistsError, match=message):
        write(target, overwrite=False, meanwhile=lambda: old_folder(target))
    assert contents(target) == OLD
    with pytest.raises(FileExistsError, match=message):
        write(target, overwrite=False, meanwhile=lambda: pytest.fail("the block ran"))
    assert list(tmp_path.iterdir()) == [target]


def test_the_slower_of_two_writers_is_refused_at_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result"
    monkeypatch.setattr(_io, "fsync_tree", lambda _: old_folder(target))  # after the check
    with pytest.raises(FileExistsError, match="result exists"):
        write(target, overwrite=False)
    assert contents(target) == OLD
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_have_two_temporary_names(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with _io.atomic_folder(target, overwrite=True) as first, _io.atomic_folder(target, overwrite=True) as second:
        assert first != second
        fill(first)
        (second / "a").write_text("of the second")
    assert contents(target) == NEW, "the first writer finishes last"
    assert _io.temporary_path(target) != _io.temporary_path(target)
    with _io.atomic_file(tmp_path / "file") as first, _io.atomic_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"


def test_files_and_folders_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []  # inode, and whether the target exists
    targets = (tmp_path / "folder", tmp_path / "file")
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, any(target.exists() for target in targets)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write(targets[0])
    below = {path.stat().st_ino for path in (targets[0], *targets[0].rglob("*"))}
    assert {(inode, False) for inode in below} == set(flushed[:-1])
    assert flushed[-1] == (tmp_path.stat().st_ino, True)
    shutil.rmtree(targets[0])
    flushed.clear()
    _io.write_text(targets[1], "text")
    assert flushed == [(targets[1].stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    with _io.atomic_folder(tmp_path / "result", overwrite=False) as folder:
        (folder / "latest").symlink_to("absent")
    assert (tmp_path / "result" / "latest").is_symlink()
    _io.remove(tmp_path / "result" / "latest")
    assert contents(tmp_path / "result") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ('{"a": 1', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", r"is \[1\]; expected an object"),
        ("{}", "has no 'a'"),
        ('{"a": "1"}', "'a' is \"1\"; expected an integer"),
        ('{"a": true}', "'a' is true; expected an integer"),
        ('{"a": 1, "b": {}}', "'b' is {}; expected a list or null"),
    ],
)
def test_json_of_another_schema_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json:? {message}"):
        _io.read_json(path, {"a": int, "b": (list, type(None))})


def test_json_of_the_schema_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    _io.write_json(path, {"a": 1, "b": None, "c": "ü"})
    assert _io.read_json(path, {"a": int, "b": (list, type(None))}) == {"a": 1, "b": None, "c": "ü"}


HOSTILE = [
    "../x",
    "a/../x",
    "/etc/x",
    "a//x",
    "./x",
    "",
    ".",
    "..",
    "a/",
    "C:x",
    "a\\x",
    "a\0x",
    "a\nx",
    "a\udc80",
    3,
    None,
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^m\.json names the file .*; expected a path inside its folder$"):
        _io.safe_name(tmp_path, name, "m.json")


@pytest.mark.parametrize("name", ["a", "train/00000.arrow", ".hidden", "..a", "a..b/c d", "\u6771.arrow"])
def test_a_name_inside_its_folder_is_a_path(tmp_path, name):
    assert _io.safe_name(tmp_path, name, "m.json") == tmp_path / name


def test_json_of_an_implausible_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(ValueError, match=r"a\.json has 1099511627776 bytes; expected at most"):
        _io.read_json(path)
