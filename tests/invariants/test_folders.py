"""The reference reads what a folder says of texts and vectors: no false alarm, and a model that ignores it is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bert_fast.cli.main import main

SENTENCE = "sentence_transformers.sentence_transformer.modules."
WIDTH = 32  # of the models


def edit(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


def write_modules(folder: Path, **pooling: Any) -> None:
    (folder / "1_Pooling").mkdir()
    edit(folder / "1_Pooling" / "config.json", embedding_dimension=WIDTH, pooling_mode="mean", **pooling)
    write_entries(folder, {"": "Transformer", "1_Pooling": "Pooling"})


def write_entries(folder: Path, kinds: dict[str, str]) -> None:
    packages = {"Transformer": "sentence_transformers.base.modules.transformer.Transformer"}
    packages |= {"Pooling": f"{SENTENCE}pooling.Pooling"}
    packages |= {"Dense": "sentence_transformers.base.modules.dense.Dense"}
    packages |= {"LayerNorm": f"{SENTENCE}layer_norm.LayerNorm"}
    packages |= {"Normalize": "sentence_transformers.base.modules.normalize.Normalize"}
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": packages[kind]}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(entries))


def prompt(folder: Path) -> None:
    write_modules(folder)
    prompts = {"query": "query: ", "document": ""}
    edit(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")


def prompt_left_out(folder: Path) -> None:
    write_modules(folder, include_prompt=False)
    edit(folder / "config_sentence_transformers.json", prompts={"q": "search for this: "}, default_prompt_name="q")


def truncated_vectors(folder: Path) -> None:
    write_modules(folder)
    edit(folder / "config_sentence_transformers.json", truncate_dim=20)


def dense(folder: Path) -> None:
    write_modules(folder)
    torch.manual_seed(1)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_LN": "LayerNorm", "4_N": "Normalize"}
    for path in list(kinds)[2:]:
        (folder / path).mkdir()
    edit(
        folder / "2_Dense" / "config.json",
        in_features=WIDTH,
        out_features=24,
        bias=True,
        activation_function="torch.nn.modules.activation.Tanh",
    )
    linear = {"linear.weight": 0.3 * torch.randn(24, WIDTH), "linear.bias": 0.3 * torch.randn(24)}
    save_file(linear, folder / "2_Dense" / "model.safetensors")
    edit(folder / "3_LN" / "config.json", dimension=24)
    save_file({"norm.weight": torch.rand(24), "norm.bias": torch.randn(24)}, folder / "3_LN" / "model.safetensors")
    write_entries(folder, kinds)


def model_max_length(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=24)


def task(folder: Path) -> None:
    entry = {"name": "sentence-embedding", "options": {"pooling": "cls"}}
    edit(folder / "config.json", bert_fast_task={**entry, "text": {"max_length": 40, "long": "head_tail"}})


FOLDERS = (prompt, prompt_left_out, truncated_vectors, dense, model_max_length, task)
# What a model that ignores the folder's files looks like.
NAMES = {
    prompt: "the default prompt is left out",
    prompt_left_out: "the default prompt is left out",
    truncated_vectors: "",
    dense: "the modules after the pooling, or truncate_dim, are left out",
    model_max_length: "the maximum length is 128, not 24",
    task: "mean pooling in place of cls pooling",
}


@pytest.fixture
def folder(model_folder: Any, tmp_path: Path) -> Path:
    shutil.copytree(model_folder("bert"), tmp_path / "model")
    edit(tmp_path / "model" / "tokenizer_config.json", model_max_length=128)
    return tmp_path / "model"


@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_a_right_model_is_no_false_alarm(
    folder: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder)
    libraries = {"bert_fast": 11, "transformers": 10}
    if write is not task:  # sentence-transformers does not read our entry of config.json
        libraries["sentence-transformers"] = 7
    for library, count in libraries.items():
        code = main(["verify", "--model", str(folder), "--library", library])
        out = capsys.readouterr().out
        assert code == 0, out
        assert f"{count} of {count} invariants hold" in out


@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_a_model_that_ignores_its_folder_is_found(
    folder: Path, tmp_path: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ignoring = tmp_path / "ignoring"
    shutil.copytree(folder, ignoring)
    write(folder)
    assert main(["verify", "--model", str(ignoring), "--against", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"looks like: {NAMES[write]}" in out or not NAMES[write]


def test_normalize_without_a_pooling_is_refused_where_modules_follow(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense(folder)
    assert main(["verify", "--model", str(folder), "--normalize", "false"]) == 2
    assert "has modules after its pooling" in capsys.readouterr().err
