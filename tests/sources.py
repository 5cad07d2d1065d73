"""The files of the sources, for tests that read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What git ignores, for a copy of the sources that lacks .git.
_IGNORED = {"build", "dist", "verified", "__pycache__"}


def source_files() -> list[str]:
    """The paths of tracked and new files below the root; without .git those that no build or tool has made."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [name for name in names if (ROOT / name).exists()]
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not _is_ignored(path))


def _is_ignored(path: Path) -> bool:
    hidden = any(part.startswith(".") and part not in (".ci", ".gitignore", ".clang-format") for part in path.parts)
    made = (
        path.suffix in (".so", ".pyc")
        or path.name == "_build_info.json"
        or any(".egg-info" in part for part in path.parts)
    )
    return hidden or made or bool(_IGNORED & set(path.parts))
