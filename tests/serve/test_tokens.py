"""What a request says about truncation, special tokens and prompts, against what the folder says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder
from tokenizers.processors import TemplateProcessing

from tests.serve.conftest import Running, serving

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from bert_fast.serve.model import load


def test_a_requested_side_overrides_the_folders(folders: dict[str, Path]) -> None:
    """A folder that keeps the tail is cut at the left only where the request says nothing."""
    served = load(str(folders["embedder"]), device="cpu", precision="fp32", auto_truncate=True)
    served = replace(served, modules=replace(served.modules, keep="tail"))
    text = "cat " * 38 + "dog " * 38  # 40 positions, two of them special
    tail, right, left = (served.tokenize([text], side=side)[0].ids for side in (None, "Right", "left"))
    cat, dog = (served.tokenizer.token_to_id(word) for word in ("cat", "dog"))
    assert tail == left
    assert set(tail[1:-1]) == {dog}
    assert set(right[1:-1]) == {cat}
    assert len(tail) == len(right) == 40


@pytest.mark.parametrize(("template", "around"), [("$A [SEP]", ([], ["[SEP]"])), ("[CLS] $A", (["[CLS]"], []))])
def test_token_ids_get_special_tokens_on_their_own_side(
    folders: dict[str, Path], template: str, around: tuple[list[str], list[str]]
) -> None:
    served = load(str(folders["embedder"]), device="cpu", precision="fp32", auto_truncate=True)
    names = [word for word in template.split() if word != "$A"]
    special = [(name, served.tokenizer.token_to_id(name)) for name in names]
    served.tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    head, tail = ([served.tokenizer.token_to_id(name) for name in part] for part in around)
    cat = served.tokenizer.token_to_id("cat")
    whole = [*head, cat, cat, *tail]
    assert [tokens.ids for tokens in served.tokenize([[cat, cat], whole, "cat cat"])] == [whole] * 3


def test_predict_has_the_default_prompt_as_rerank_has(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "prompted"
    shutil.copytree(folders["reranker"], folder)
    encoder = CrossEncoder(str(folder), device="cpu", prompts={"query": "the law "}, default_prompt_name="query")
    encoder.save_pretrained(str(folder))
    with serving(folder, "--precision", "fp32", "--log", "none") as running:
        ranked = _post(running, "/rerank", query="cat", texts=["a dog"])[0]["score"]
        predicted = _post(running, "/predict", inputs=[["cat", "a dog"]])[0][0]["score"]
    assert predicted == ranked
    # Two computations in float32 of numbers below 1: eps (6e-8) times some ten roundings a layer.
    assert ranked == pytest.approx(float(encoder.predict([("cat", "a dog")])[0]), abs=2e-6)
    plain = CrossEncoder(str(folders["reranker"]), device="cpu").predict([("cat", "a dog")])[0]
    assert abs(ranked - float(plain)) > 1e-4, "the prompt counts"


def _post(running: Running, path: str, **body: Any) -> Any:
    return running.client.post(path, json=body).raise_for_status().json()
