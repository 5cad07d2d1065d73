"""The answers of every route, beside the same models in transformers and sentence-transformers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert_fast.data import load_tokenizer
from tests.serve.conftest import PAIRS, TEXTS

pytest.importorskip("fastapi")
pytest.importorskip("httpx")


def theirs(folder: Path, kind: str, *texts: Any) -> list[torch.Tensor]:
    """The logits or the last hidden state of transformers' model in float64, text by text."""
    tokenizer = load_tokenizer(folder)
    model = getattr(transformers, kind).from_pretrained(folder).double().eval()
    found = []
    for text in texts:
        encoding = tokenizer.encode(*text) if isinstance(text, tuple) else tokenizer.encode(text)
        ids, types = (torch.tensor([values]) for values in (encoding.ids, encoding.type_ids))
        with torch.no_grad():
            out = model(input_ids=ids, token_type_ids=types)
        found.append((out.last_hidden_state if "last_hidden_state" in out else out.logits)[0])
    return found


def close(found: Any, expected: Any) -> None:
    # float32 beside float64 through two layers: eps (6e-8) times some ten roundings of numbers of size 1 to 10.
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else np.array(expected)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


def post(server: Any, path: str, **body: Any) -> Any:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_embed_is_the_mean_of_the_token_vectors(server: Any, folders: dict[str, Path]) -> None:
    means = [hidden.mean(0) for hidden in theirs(folders["embedder"], "BertModel", *TEXTS)]
    close(post(server, "/embed", inputs=TEXTS, normalize=False), torch.stack(means))
    unit = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    close(post(server, "/embed", inputs=TEXTS), unit)
    close(post(server, "/embed", inputs=TEXTS[0]), unit[:1])
    cut = torch.nn.functional.normalize(torch.stack(means)[:, :5], dim=-1)
    close(post(server, "/embed", inputs=TEXTS, dimensions=5), cut)
    tokenizer = load_tokenizer(folders["embedder"])
    with_special = [tokenizer.encode(text).ids for text in TEXTS]
    without = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS if text]
    close(post(server, "/embed", inputs=with_special), unit)
    close(post(server, "/embed", inputs=without), unit[[bool(text) for text in TEXTS]])
    close(post(server, "/embed", inputs=without[0]), unit[:1])


def test_embed_all_has_every_token(server: Any, folders: dict[str, Path]) -> None:
    found = post(server, "/embed_all", inputs=TEXTS)
    for vectors, expected in zip(found, theirs(folders["embedder"], "BertModel", *TEXTS), strict=True):
        close(vectors, expected)


def test_embed_sparse_is_splade(server: Any, folders: dict[str, Path]) -> None:
    found = post(server, "/embed_sparse", inputs=TEXTS)
    for entries, logits in zip(found, theirs(folders["filler"], "BertForMaskedLM", *TEXTS), strict=True):
        expected = logits.relu().log1p().amax(0)
        assert [entry["index"] for entry in entries] == expected.nonzero().squeeze(1).tolist()
        close([entry["value"] for entry in entries], expected[expected > 0])


def test_similarity_is_the_cosine(server: Any) -> None:
    unit = np.array(post(server, "/embed", inputs=TEXTS))
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    close(post(server, "/similarity", inputs=inputs), unit[1:] @ unit[0])
    close(post(server, "/", inputs=inputs), unit[1:] @ unit[0])


def test_openai_embeddings(server: Any) -> None:
    unit = post(server, "/embed", inputs=TEXTS[:2])
    found = post(server, "/v1/embeddings", input=TEXTS[:2], model="embedder")
    assert [entry["embedding"] for entry in found["data"]] == unit
    assert [entry["index"] for entry in found["data"]] == [0, 1]
    tokens = sum(len(row) for row in post(server, "/tokenize", inputs=TEXTS[:2]))
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    encoded = post(server, "/v1/embeddings", input=TEXTS[:2], encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").tolist() for entry in encoded["data"]]
    assert decoded == unit


def test_rerank_sorts_by_the_score(server: Any, folders: dict[str, Path]) -> None:
    logits = theirs(folders["reranker"], "BertForSequenceClassification", *PAIRS)
    raw = np.array([float(row[0]) for row in logits])
    order = np.argsort(-raw).tolist()
    texts = [text for _, text in PAIRS]
    found = post(server, "/rerank", query=PAIRS[0][0], texts=texts, raw_scores=True, return_text=True)
    assert [entry["index"] for entry in found] == order
    assert [entry["text"] for entry in found] == [texts[index] for index in order]
    close([entry["score"] for entry in found], raw[order])
    found = post(server, "/rerank", query=PAIRS[0][0], texts=texts)
    close([entry["score"] for entry in found], 1 / (1 + np.exp(-raw[order])))
    listed = post(server, "/v1/rerank", model="reranker", query=PAIRS[0][0], documents=[texts[0], {"text": texts[1]}])
    assert [result["index"] for result in listed["results"]] == [index for index in order if index < 2]
    first = post(server, "/v1/rerank", query=PAIRS[0][0], documents=texts, top_n=1, return_documents=True)
    assert [result["document"]["text"] for result in first["results"]] == [texts[order[0]]]


def test_predict_has_the_probability_of_every_label(server: Any, folders: dict[str, Path]) -> None:
    names = ["bad", "fair", "good"]
    for row, (text, logits) in enumerate(
        zip(TEXTS, theirs(folders["classifier"], "BertForSequenceClassification", *TEXTS), strict=True)
    ):
        for found in (
            post(server, "/predict", inputs=text),
            post(server, "/predict", inputs=[[text] for text in TEXTS])[row],
        ):
            assert [entry["label"] for entry in found] == [names[i] for i in logits.argsort(descending=True)]
            close([entry["score"] for entry in found], logits.softmax(-1).sort(descending=True).values)
    pairs = theirs(folders["classifier"], "BertForSequenceClassification", *PAIRS)
    found = post(server, "/predict", inputs=[list(pair) for pair in PAIRS], raw_scores=True)
    for entries, logits in zip(found, pairs, strict=True):
        close([entry["score"] for entry in entries], logits.sort(descending=True).values)


def test_fill_mask_and_entities(server: Any, folders: dict[str, Path]) -> None:
    text = "the [MASK] sat on a [MASK]"
    tokenizer = load_tokenizer(folders["filler"])
    (logits,) = theirs(folders["filler"], "BertForMaskedLM", text)
    found = post(server, "/fill_mask", inputs=text, top_k=3)
    assert len(found) == 2
    for entries, position in zip(found, (2, 6), strict=True):
        best = logits[position].softmax(-1).topk(3)
        assert [entry["token_str"] for entry in entries] == [tokenizer.id_to_token(i) for i in best.indices.tolist()]
        close([entry["score"] for entry in entries], best.values)
    text = "ada sat in paris , cats"
    (logits,) = theirs(folders["tagger"], "BertForTokenClassification", text)
    firsts = logits[[1, 2, 3, 4, 5, 6]]  # "cats" is two tokens, of which the first counts
    words = post(server, "/entities", inputs=text)
    assert [text[word["start"] : word["end"]] for word in words] == ["ada", "sat", "in", "paris", ",", "cats"]
    assert [word["label"] for word in words] == [["O", "PER", "LOC"][i] for i in firsts.argmax(-1).tolist()]
    close([word["score"] for word in words], firsts.softmax(-1).amax(-1))


def test_long_texts_are_cut_or_refused(server: Any) -> None:
    long = "cat " * 100
    cut = post(server, "/embed", inputs=["cat " * 38])  # 40 positions, two of them special
    assert post(server, "/embed", inputs=[long]) == cut
    assert post(server, "/embed", inputs=["dog " * 5 + long], truncation_direction="left") == cut
    answer = server.client.post("/embed", json={"inputs": ["cat", long], "truncate": False})
    assert answer.status_code == 422
    assert "the text 1 has 102 tokens; expected at most 40" in answer.json()["error"]
    answer = server.client.post("/rerank", json={"query": "cat", "texts": [long], "truncate": False})
    assert answer.status_code == 422
    ranked = post(server, "/rerank", query="cat", texts=[long, "cat " * 36], raw_scores=True)
    assert ranked[0]["score"] == ranked[1]["score"]


def test_an_answer_is_the_same_bits_whatever_else_is_asked(server: Any) -> None:
    alone = [post(server, "/embed", inputs=text)[0] for text in TEXTS]
    assert post(server, "/embed", inputs=TEXTS) == alone
    assert post(server, "/embed", inputs=(TEXTS * 20)[:64]) == (alone * 20)[:64]
    scores = [post(server, "/predict", inputs=text) for text in TEXTS]
    assert post(server, "/predict", inputs=[[text] for text in TEXTS]) == scores


def test_tokenize_and_decode_are_inverse(server: Any) -> None:
    rows = post(server, "/tokenize", inputs=["the cats sat"])
    assert [token["text"] for token in rows[0]] == ["[CLS]", "the", "cat", "##s", "sat", "[SEP]"]
    assert [(token["start"], token["stop"]) for token in rows[0][1:-1]] == [(0, 3), (4, 7), (7, 8), (9, 12)]
    assert post(server, "/decode", ids=[token["id"] for token in rows[0]]) == ["the cats sat"]
    bare = post(server, "/tokenize", inputs="the", add_special_tokens=False)
    assert [token["text"] for token in bare[0]] == ["the"]


def test_info_models_metrics_and_health(server: Any, folders: dict[str, Path]) -> None:
    info = server.client.get("/info").json()
    assert info["model_id"] == "embedder"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert {model["model_id"]: model["kind"] for model in info["models"]} == {
        "embedder": "embedding",
        "reranker": "reranker",
        "classifier": "classifier",
        "tagger": "token-classifier",
        "filler": "masked-lm",
    }
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == list(folders)
    assert server.client.get("/health").status_code == 200
    before = _metric(server, 'te_request_success{method="embed"}')
    server.client.post("/embed", json={"inputs": "cat"})
    server.client.post("/embed", json={"inputs": []})
    assert _metric(server, 'te_request_success{method="embed"}') == before + 1
    assert _metric(server, 'te_request_failure{err="empty"}') >= 1
    assert _metric(server, "te_queue_size") == 0
    assert _metric(server, "te_batch_next_size_count") > 0


def _metric(server: Any, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(name + " ")), 0))


def test_headers_say_what_a_request_cost(server: Any) -> None:
    answer = server.client.post("/embed", json={"inputs": ["the cat", "a dog sat"]}, headers={"x-request-id": "mine"})
    assert answer.headers["x-compute-tokens"] == "9"
    assert answer.headers["x-compute-characters"] == "16"
    assert answer.headers["x-request-id"] == "mine"
    assert int(answer.headers["x-total-time"]) >= int(answer.headers["x-inference-time"])


@pytest.mark.parametrize("path", ["/", "/embed"])
def test_the_first_model_answers_the_root(server: Any, path: str) -> None:
    assert post(server, path, inputs="the cat") == post(server, "/embed", inputs="the cat")
