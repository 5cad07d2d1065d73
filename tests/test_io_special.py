"""Atomic files and folders: leftovers of killed writers, kept files, links, devices, errors of the device, modes."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bert_fast import _io
from tests.folders import NEW, OLD, contents, fill, old_folder


def leftover(folder: Path, pid: int, host: str = _io._HOST, suffix: str = ".tmp") -> Path:
    path = folder / f".result.{host}-{pid}-0123abcd{suffix}"
    path.mkdir()
    (path / "a").write_text("x")
    return path


def test_a_leftover_whose_process_number_is_used_again_is_removed(tmp_path: Path) -> None:
    """In a container the next process has the number of the killed one."""
    own = leftover(tmp_path, os.getpid())
    _io.recover(tmp_path, exclusive=False)
    assert not own.exists()
    before = leftover(tmp_path, 1)  # process 1 may have written it
    _io.recover(tmp_path, exclusive=False)
    assert before.exists()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        later = leftover(tmp_path, child.pid)
        assert not _io._has_ended(_io._HOST, child.pid, later.stat().st_ctime)
        assert _io._has_ended(_io._HOST, child.pid, later.stat().st_ctime - 3600)
    finally:
        child.communicate(b"\n")
    _io.recover(tmp_path, exclusive=False)
    assert not later.exists()


def test_a_leftover_of_another_host_is_removed_after_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, old = leftover(tmp_path, 1, "00000000"), leftover(tmp_path, 2, "00000000", ".old")
    _io.recover(tmp_path, exclusive=False)
    assert other.exists()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 24 * 3600)
    _io.recover(tmp_path, exclusive=False)
    assert [path.name for path in tmp_path.iterdir()] == ["result"], "the old folder has its name again"
    assert not old.exists()


@pytest.mark.parametrize("replaceable", [True, False], ids=["exchanged", "file by file"])
def test_other_files_of_a_folder_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaceable: bool) -> None:
    target = tmp_path / "result"
    old_folder(target)
    (target / "sub").mkdir(mode=0o750)
    (target / "sub" / "mine").write_text("mine")
    (target / "link").symlink_to("absent")
    target.chmod(0o700)
    with (target / "log").open("a") as log:
        log.write("1")
        log.flush()
        if not replaceable:
            monkeypatch.chdir(target / "sub")
        with _io.atomic_folder(target, overwrite=True, keep_others=True) as folder:
            assert replaceable == (folder.parent == tmp_path)
            fill(folder)
        log.write("2")
    assert (target / "link").is_symlink()
    (target / "link").unlink()
    assert contents(target) == {**NEW, "b": "old b", "sub/mine": "mine", "log": "12"}
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / "sub" / "mine").stat().st_nlink == 1
    assert list(tmp_path.iterdir()) == [target]


def test_links_to_a_target_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for _ in range(2):
        _io.write_text(tmp_path / "file", "text")
        with _io.atomic_folder(tmp_path / "folder", overwrite=True) as folder:
            fill(folder)
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder"))
    assert (tmp_path / "disk" / "file").read_text() == "text"
    assert contents(tmp_path / "disk" / "folder") == NEW
    assert len(list((tmp_path / "disk").iterdir())) == 2


def test_a_device_or_a_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    _io.write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    _io.write_text(pipe, "text")
    assert reader.communicate()[0] == b"text"
    assert pipe.is_fifo()
    script = "from pathlib import Path; from bert_fast import _io; _io.write_text(Path('/dev/stdout'), 'text')"
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "text"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no shared memory to write to")
def test_a_file_in_shared_memory_is_an_ordinary_one() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        target = Path(folder) / "new" / "file"
        for text in ("old", "new"):
            _io.write_text(target, text)
            assert target.read_text() == text
        with pytest.raises(ZeroDivisionError), _io.atomic_file(target):
            raise ZeroDivisionError
        assert target.read_text() == "new"


@pytest.mark.parametrize("target", ["file", "folder"])
@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota"), (errno.EIO, "I/O")]
)
def test_an_error_of_the_device_names_the_target(tmp_path: Path, target: str, number: int, reason: str) -> None:
    path = tmp_path / "result"
    writer = _io.atomic_file(path) if target == "file" else _io.atomic_folder(path, overwrite=True)
    with pytest.raises(OSError, match=rf"result can't be written: .*{reason}") as caught, writer:
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from bert_fast import _io
sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with _io.atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
        save_file({"a": torch.zeros(10_000)}, str(folder / "a.safetensors"))
except OSError as error:
    print(error.errno, error)
"""


def test_a_limit_of_the_file_size_that_safetensors_meets_is_reported(tmp_path: Path) -> None:
    target = tmp_path / "result"
    old_folder(target)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert f"{target} can't be written: the file would exceed the limit of this process (ulimit -f)" in done.stdout
    assert contents(target) == OLD
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_that_numpy_shortens_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python cuts a .pyc at the limit without an error
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = "result can't be written: the disk is full, or a quota or limit is reached"
        with (
            pytest.raises(OSError, match=message),
            _io.atomic_file(tmp_path / "result") as path,
            path.open("wb") as file,
        ):
            np.save(file, np.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert list(tmp_path.iterdir()) == []


def test_every_file_has_the_mode_of_a_new_file(tmp_path: Path) -> None:
    """safetensors gives its files the mode 0600."""
    with _io.atomic_folder(tmp_path / "result", overwrite=True) as folder:
        save_file({"a": torch.zeros(1)}, str(folder / "a.safetensors"))
    with _io.atomic_file(tmp_path / "a.safetensors") as path:
        save_file({"a": torch.zeros(1)}, str(path))
    (tmp_path / "plain").touch()
    for path in (tmp_path / "result" / "a.safetensors", tmp_path / "a.safetensors"):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path


def test_an_exclusive_writer_spares_a_live_writer_of_this_host(tmp_path: Path) -> None:
    """A fine-tuning run into a folder in the output of a pretraining run. A zombie is no writer any more."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        host = _io.temporary_path(tmp_path / "x").name.split(".")[2].partition("-")[0]
        folder = tmp_path / f".tuned.{host}-{process.pid}-01234567.tmp"
        folder.mkdir()
        _io.recover(tmp_path)
        assert folder.exists()
        process.kill()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        _io.recover(tmp_path)
        assert not folder.exists()
    finally:
        process.kill()
        process.wait()
