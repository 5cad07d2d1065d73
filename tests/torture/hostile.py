"""Attacks by files that somebody else made: code in disguise, names of other places, bombs, texts that are markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tests.torture.hostile_texts  # noqa: F401  (fills CASES)
from tests.torture import kills
from tests.torture.attack import Attack, Case
from tests.torture.hostile_files import CASES

# Cases that draw what they write: many of each are worth running.
_DRAWN = ("settings of models", "rows of strange json", "yaml that names classes")


def one(case: Case, name: str) -> None:
    case.note(name)
    folder = case.folder / "work"
    folder.mkdir()
    CASES[name](case, folder)


def any_of_many(case: Case, _: Any) -> None:
    """A case of those that draw what they write."""
    one(case, case.rng.choice(_DRAWN))


def _named(material: Path) -> list[str]:
    for name in ("pretrain", "prepare", "finetune", "predict p.csv", "embed v.npy"):
        kills._uninterrupted(material, kills.BY_NAME[name])  # imports here what the forks would import
    return [name for name in CASES if name not in _DRAWN]


ATTACKS = [
    Attack("hostile", "files that somebody else made", one, _named, share=3, quick=4, timeout=180),
    Attack("hostile", "settings, rows and YAML", any_of_many, share=2, quick=8, timeout=180),
]
