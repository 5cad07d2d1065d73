"""The folder of a model: on disk, in the hub's cache, or a sentence about why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from bert_fast.models.snapshot import local_folder


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_folder(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert local_folder("~/m") == tmp_path / "m"


def test_a_hub_name_is_downloaded_without_pickles_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("someone/model") == tmp_path
    assert asked["name"] == "someone/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".pkl", "*")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["absent", "someone/absent", "./absent", "/absent", "a/b/c", "", "a b", "..absent"])
def test_without_either_a_sentence_says_so(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"is not a folder; expected a checkpoint, or a hub name") as error:
        local_folder(name, "a checkpoint")
    assert "\n" not in str(error.value)
    can_be_a_name = name in ("absent", "someone/absent")
    assert ("not in the hub's cache, and the hub can't be reached" in str(error.value)) == can_be_a_name
