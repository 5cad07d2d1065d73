"""How the files of a result come to be: whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_target(target: Path, *, overwrite: bool) -> None:
    """FileExistsError where `target` is there and may not be replaced."""
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; choose another output_dir, or give --overwrite true")


@contextmanager
def result_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name where the block ends well, and is removed where not.

    Raises:
        FileExistsError: `target` is there and `overwrite` is False.
    """
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".writing-{target.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    temporary.rename(target)


def write_json(path: Path, values: Any) -> None:
    """JSON as the files of a result folder have it; what JSON does not know becomes text."""
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
