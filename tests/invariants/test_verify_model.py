"""`bert-fast verify --model`: exit codes, the table, and what the arguments may be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bert_fast.cli.main import main


def verify(*arguments: str) -> int:
    return main(["verify", *arguments])


def test_a_model_of_transformers_alone(model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, in two dtypes, against transformers."""
    folder = str(model_folder("roberta"))
    assert verify("--model", folder, "--against", "transformers", "--dtypes", "float32", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "22 of 22 invariants hold" in out
    assert out.count("hidden states, packing") == 2
    assert "bert_fast, bfloat16" in out


def test_a_folder_of_sentence_transformers(model_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_folder("bert", pooling="cls_token", max_seq_length=40, normalize=True))
    for library, count in (("fused", 10), ("sentence-transformers", 7)):
        assert verify("--model", folder, "--library", library) == 0
        assert f"{count} of {count} invariants hold" in capsys.readouterr().out


def test_other_weights_are_found(model_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A converted model whose token types were lost, and one whose config names another GeLU."""
    folder = model_folder("bert")
    lost, other = tmp_path / "lost", tmp_path / "other"
    for copy in (lost, other):
        shutil.copytree(folder, copy)
    tensors = load_file(lost / "model.safetensors")
    tensors["embeddings.token_type_embeddings.weight"].zero_()
    save_file(tensors, lost / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu_new"}))
    for copy, name in ((lost, "the token types are dropped"), (other, "tanh and erf GeLU are exchanged")):
        assert verify("--model", str(copy), "--against", str(folder)) == 1
        out, err = capsys.readouterr()
        assert f"looks like: {name}" in out
        assert "invariants do not hold" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{}", "--endpoint", "http://x"], "--model and --endpoint were both given"),
        (["--model", "{}", "--ops", "attention"], "--ops was given with --model or --endpoint"),
        (["--model", "{}", "--record"], "--record was given with --model or --endpoint"),
        (["--model", "{}", "--tolerance", "0"], "--tolerance is 0.0; expected a number above 0"),
        (["--model", "{}", "--pooling", "middle"], "pooling is 'middle'; expected one of mean, cls"),
        (["--against", "{}"], "--against was given without --model or --endpoint"),
    ],
)
def test_wrong_arguments_are_named(
    model_folder: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folder("bert"))
    assert verify(*(argument.format(folder) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
