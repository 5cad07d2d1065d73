"""Folders that the tests of `bert_fast._io` replace, and what is in them."""

from __future__ import annotations

from pathlib import Path

OLD, NEW = {"a": "old a", "b": "old b"}, {"a": "new a", "sub": None, "sub/c": "new c"}


def contents(folder: Path) -> dict[str, str | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None for path in folder.rglob("*")
    }


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a").write_text("new a")
    (folder / "sub" / "c").write_text("new c")


def old_folder(target: Path) -> None:
    target.mkdir()
    for name, text in OLD.items():
        (target / name).write_text(text)
