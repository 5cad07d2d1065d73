"""The folder of the task `rerank`: its server gives the scores of `rerank`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bert_fast
from bert_fast._config import from_mapping
from bert_fast.finetune import FinetuneConfig, finetune
from tests.serve.conftest import serving

pytest.importorskip("fastapi")
pytest.importorskip("httpx")


def test_a_folder_of_the_task_rerank_is_served_as_it_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"query": query, "text": f"the {text} sat on a mat", "label": int(query == text)}
        for query in ("cat", "dog", "paris")
        for text in ("cat", "dog", "paris", "court")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "rerank", "model": folders["embedder"], "output_dir": tmp_path / "run",
        "data": {"train": tmp_path / "train.jsonl"}, "text": {"max_length": 12}, "epochs": 2.0, "progress": False,
        "report": False, "device": "cpu",
    }  # fmt: skip
    result = finetune(from_mapping(FinetuneConfig, values), report=lambda _: None)
    query, texts = "the cat", ["a dog", "the cat sat on a mat " * 3, "", "paris , the court in paris"]
    model = bert_fast.BertForSequenceClassification.from_pretrained(result.folder).eval()
    expected = model.rerank(query, texts).tolist()
    with serving(f"mine={result.folder}", "--precision", "fp32", "--log", "none") as running:
        assert running.client.get("/info").json()["models"] == [
            {"model_id": "mine", "kind": "reranker", "dtype": "float32", "max_input_length": 12}
        ]
        found = running.client.post("/rerank", json={"query": query, "texts": texts}).raise_for_status().json()
    assert [row["index"] for row in found] == sorted(range(4), key=lambda index: (-expected[index], index))
    # float32 (eps 1.2e-7): the same logits in other batches.
    scores = {row["index"]: row["score"] for row in found}
    assert [scores[index] for index in range(4)] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len({round(score, 6) for score in expected}) == 4, "the scores differ"
