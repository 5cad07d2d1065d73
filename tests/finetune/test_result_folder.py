"""Replacing the result of a run: whatever interrupts it, the old or the new result is complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_fast._io import atomic_folder

FILES = ("model.safetensors", "nested/config.json", "metrics.json")
# The calls that change the file system, of which Path and shutil are made.
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
# Replaces the result at argv[1], and kills itself before call number argv[2]; otherwise prints the number of calls.
SCRIPT = f"""
import os, signal, sys
from pathlib import Path
from bert_fast._io import atomic_folder

count, last = 0, int(sys.argv[2])
def counted(call):
    def run(*args, **kwargs):
        global count
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return call(*args, **kwargs)
    return run

for name in {CALLS!r}:
    setattr(os, name, counted(getattr(os, name)))
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    for name in {FILES!r}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")
print(count)
"""


def write(folder: Path, content: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)


def is_complete(folder: Path, content: str) -> bool:
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return paths == set(FILES) and all((folder / name).read_text() == content for name in FILES)


def check(target: Path) -> None:
    """The target, if it exists, is complete; some folder is complete; and the next writer succeeds."""
    assert not target.exists() or is_complete(target, "old") or is_complete(target, "new")
    assert any(is_complete(folder, content) for folder in target.parent.iterdir() for content in ("old", "new"))
    with atomic_folder(target, overwrite=True) as folder:
        write(folder, "next")
    assert is_complete(target, "next")


def run_script(target: Path, last: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(target), str(last)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_kill_at_any_moment_leaves_a_complete_result(tmp_path: Path) -> None:
    write(tmp_path / "all" / "run", "old")
    calls = int(run_script(tmp_path / "all" / "run", -1).stdout)
    assert is_complete(tmp_path / "all" / "run", "new")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["run"], "no leftovers"
    assert calls > 12
    for last in range(calls):
        target = tmp_path / str(last) / "run"
        write(target, "old")
        assert run_script(target, last).returncode == -signal.SIGKILL
        check(target)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_an_exception_at_any_moment_leaves_a_complete_result(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in range(100):
        target = tmp_path / str(last) / "run"
        write(target, "old")
        count = 0

        def counted(call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == last + 1:  # noqa: B023
                    raise error
                return call(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                with atomic_folder(target, overwrite=True) as folder:
                    write(folder, "new")
            except type(error):
                pass
        if count <= last:  # the writer made fewer calls: every moment has been tried
            break
        assert target.exists(), "an exception restores the old result"
        check(target)
    assert last > 12
    assert is_complete(target, "new")


def test_an_exception_in_the_block_leaves_no_trace(tmp_path: Path) -> None:
    def fail(target: Path, overwrite: bool) -> None:
        with atomic_folder(target, overwrite=overwrite) as folder:
            (folder / FILES[0]).write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail(tmp_path / "run", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "run", "old")
    with pytest.raises(RuntimeError, match="interrupted"):
        fail(tmp_path / "run", overwrite=True)
    assert is_complete(tmp_path / "run", "old")
    with pytest.raises(FileExistsError, match="run exists; choose another folder, or give --overwrite true"):
        fail(tmp_path / "run", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
