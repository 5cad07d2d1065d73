"""Cross-encoders and SPLADE: the scores and vectors of sentence-transformers' CrossEncoder and SparseEncoder."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert_fast.cli.main import main
from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer
from bert_fast.models import BertForMaskedLM, BertForSequenceClassification, BertModel
from bert_fast.models.reranking import PairTemplate

st: Any = (
    pytest.importorskip("sentence_transformers")
    if torch.cuda.is_available()
    else importlib.import_module("sentence_transformers")
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(55)), "query", ":"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    "XLMRoberta": {**SIZES, "pad_token_id": 1},
    "Electra": {**SIZES, "embedding_size": 32},
    "DistilBert": {
        **{"vocab_size": len(WORDS), "max_position_embeddings": 66, "initializer_range": 0.15},
        **{"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 3},
    },
}
QUERY = "w1 w2 query"
TEXTS = ["w1 w2", "", "w3", "w4 w5 w6 w7 w8 w9", "w5 " * 90, *(f"w{i} w{2 * i} w7" for i in range(12))]
# float32 in another order through two layers: an eps or two of values of up to 10.
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


def save(folder: Path, family: str, head: str, **settings: Any) -> Path:
    """A model of transformers and its tokenizer, in `folder`."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = load_tokenizer(folder / "vocab.txt")
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **settings})
    model = getattr(transformers, f"{family}For{head}")(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * 0.1)  # biases too
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model_max_length=64)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, head: str) -> Path:
        if (family, head) not in made:
            settings = {"num_labels": 1} if head == "SequenceClassification" else {}
            made[family, head] = save(tmp_path_factory.mktemp("plain"), family, head, **settings)
        return made[family, head]

    return make


# Cross-encoders


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_cross_encoder(plain: Any, family: str) -> None:
    folder = plain(family, "SequenceClassification")
    theirs = st.CrossEncoder(str(folder), device="cpu")
    ours = BertForSequenceClassification.from_pretrained(folder)
    for query in (QUERY, "", "w9 " * 50):
        expected = theirs.predict([(query, text) for text in TEXTS])
        np.testing.assert_allclose(ours.rerank(query, TEXTS), expected, **TOLERANCE)
        logits = theirs.predict([(query, text) for text in TEXTS], activation_fn=torch.nn.Identity())
        assert float(np.ptp(logits)) > 0.1
        np.testing.assert_allclose(ours.rerank(query, TEXTS, activation="torch.nn.Identity"), logits, **TOLERANCE)
    order = [item["corpus_id"] for item in theirs.rank(QUERY, TEXTS[:8])]
    assert torch.as_tensor(ours.rerank(QUERY, TEXTS[:8])).argsort(descending=True).tolist() == order
    assert ours.rerank(QUERY, TEXTS[0]).shape == ()
    assert ours.rerank(QUERY, []).shape == (0,)
    small = ours.rerank(QUERY, iter(TEXTS), batch_tokens=80, batch_size=3, convert_to_numpy=True)
    assert isinstance(small, np.ndarray)
    np.testing.assert_allclose(small, ours.rerank(QUERY, TEXTS), **TOLERANCE)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "settings",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
    ],
)
def test_the_activation_of_config_json(plain: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = shutil.copytree(plain("Bert", "SequenceClassification"), tmp_path / "model")
    change(folder / "config.json", **settings)
    theirs = st.CrossEncoder(str(folder), device="cpu")
    expected = theirs.predict([(QUERY, text) for text in TEXTS])
    ours = BertForSequenceClassification.from_pretrained(folder)
    np.testing.assert_allclose(ours.rerank(QUERY, TEXTS), expected, **TOLERANCE)
    ours.save_pretrained(tmp_path / "again")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(  # type: ignore[call-overload]
        again.rerank(QUERY, TEXTS, tokenizer=ours.source_tokenizer(), max_seqlen=64), ours.rerank(QUERY, TEXTS)
    )


def test_a_folder_that_cross_encoder_saved(plain: Any, tmp_path: Path) -> None:
    theirs = st.CrossEncoder(
        str(plain("Bert", "SequenceClassification")),
        device="cpu",
        activation_fn=torch.nn.Identity(),
        max_length=21,
        prompts={"search": "query: "},
        default_prompt_name="search",
    )
    folder = tmp_path / "saved"
    theirs.save_pretrained(str(folder))
    theirs = st.CrossEncoder(str(folder), device="cpu")
    pairs = [(QUERY, text) for text in TEXTS]
    ours = BertForSequenceClassification.from_pretrained(folder)
    np.testing.assert_allclose(ours.rerank(QUERY, TEXTS), theirs.predict(pairs), **TOLERANCE)
    np.testing.assert_allclose(ours.rerank(QUERY, TEXTS, prompt=""), theirs.predict(pairs, prompt=""), **TOLERANCE)
    ours.save_pretrained(tmp_path / "again")
    expected = ours.rerank(QUERY, TEXTS)
    again = BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again.rerank(QUERY, TEXTS), expected)  # type: ignore[arg-type]
    theirs = st.CrossEncoder(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(theirs.predict(pairs), expected, **TOLERANCE)


@pytest.mark.parametrize("sizes", [(0, 0), (3, 4), (4, 3), (10, 1), (1, 10), (10, 10), (11, 10), (30, 7), (7, 30)])
def test_pairs_are_truncated_as_tokenizers_does(plain: Any, sizes: tuple[int, int]) -> None:
    tokenizer = load_tokenizer(plain("Bert", "SequenceClassification"))
    first, second = "w1 " * sizes[0], "w2 " * sizes[1]
    template = PairTemplate.of(tokenizer)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (first, second)]
    for longest in range(5, 45):
        tokenizer.enable_truncation(longest, strategy="longest_first")
        expected = tokenizer.encode(first, second)
        tokenizer.no_truncation()
        assert template(ids[0], ids[1], longest) == (expected.ids, expected.type_ids)


def test_wrong_arguments_of_rerank_are_named(plain: Any) -> None:
    folder = plain("Bert", "SequenceClassification")
    ours = BertForSequenceClassification.from_pretrained(folder)
    for arguments, kind, message in (
        ({"query": None}, TypeError, "query is None; expected a str"),
        ({"texts": ["w1", 3]}, TypeError, r"texts\[1\] is 3; expected a str"),
        ({"activation": "os.system"}, ValueError, r"the activation function is 'os\.system'"),
        ({"max_seqlen": 4}, ValueError, "max_seqlen is 4; expected 5 to 66"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"prompt_name": "x"}, ValueError, "prompt_name is 'x'"),
    ):
        with pytest.raises(kind, match=message):
            ours.rerank(**{"query": QUERY, "texts": TEXTS, **arguments})
    two = BertForSequenceClassification.from_pretrained(folder, num_labels=2, new_head=True)
    with pytest.raises(ValueError, match="the model has 2 labels; expected one"):
        two.rerank(QUERY, TEXTS)


def test_the_command(plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plain("Bert", "SequenceClassification")
    texts = [text for text in TEXTS if text][:6]
    scores = BertForSequenceClassification.from_pretrained(folder).rerank(QUERY, texts).tolist()
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    assert main(["rerank", str(folder), QUERY, "--file", str(tmp_path / "texts.txt"), "--top-k", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == sorted(range(6), key=lambda index: -scores[index])[:4]
    assert [line["text"] for line in lines] == [texts[line["index"]] for line in lines]
    assert [line["score"] for line in lines] == pytest.approx([scores[line["index"]] for line in lines], abs=1e-5)
    assert main(["rerank", str(folder), QUERY, "w1", "--top-k", "0"]) == 2
    assert "top_k is 0; expected 1 or more" in capsys.readouterr().err


# SPLADE


@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "DistilBert"])
def test_sparse_vectors_are_those_of_a_sparse_encoder(plain: Any, family: str, monkeypatch: Any) -> None:
    folder = plain(family, "MaskedLM")
    theirs = st.SparseEncoder(str(folder), device="cpu")
    ours = BertForMaskedLM.from_pretrained(folder)
    expected = theirs.encode(TEXTS)
    vectors = ours.encode_sparse(TEXTS)
    assert vectors.is_sparse
    assert vectors.is_coalesced()
    torch.testing.assert_close(vectors.to_dense(), expected.to_dense(), **TOLERANCE)  # type: ignore[arg-type]
    assert 0 < vectors._nnz() < vectors.numel()
    monkeypatch.setattr("bert_fast.models.sparse.LOGIT_ROWS", 7)
    small = ours.encode_sparse(iter(TEXTS), batch_tokens=90, batch_size=3)
    torch.testing.assert_close(small.to_dense(), expected.to_dense(), **TOLERANCE)  # type: ignore[arg-type]
    assert ours.encode_sparse("w1").shape == (len(WORDS),)
    assert ours.encode_sparse([]).shape == (0, len(WORDS))


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_a_folder_that_sparse_encoder_saved(plain: Any, tmp_path: Path, strategy: str, activation: str) -> None:
    modules: Any = importlib.import_module("sentence_transformers.sparse_encoder.modules")
    base: Any = importlib.import_module("sentence_transformers.base.modules")
    first = base.Transformer(str(plain("Bert", "MaskedLM")), transformer_task="fill-mask", max_seq_length=19)
    last = modules.SpladePooling(pooling_strategy=strategy, activation_function=activation)
    prompts = {"query": "query: ", "document": "w9 "}
    theirs = st.SparseEncoder(modules=[first, last], device="cpu", prompts=prompts, max_active_dims=9)
    folder = tmp_path / "saved"
    theirs.save_pretrained(str(folder))
    theirs = st.SparseEncoder(str(folder), device="cpu")
    ours = BertForMaskedLM.from_pretrained(folder)

    def check(model: BertForMaskedLM, other: Any) -> None:
        for ours_, theirs_ in (
            (model.encode_sparse(TEXTS), other.encode(TEXTS)),
            (model.encode_sparse(TEXTS, task="query"), other.encode_query(TEXTS)),
            (model.encode_sparse(TEXTS, task="document"), other.encode_document(TEXTS)),
            (model.encode_sparse(TEXTS, max_active_dims=3), other.encode(TEXTS, max_active_dims=3)),
        ):
            torch.testing.assert_close(ours_.to_dense(), theirs_.to_dense(), **TOLERANCE)  # type: ignore[arg-type]

    check(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    check(BertForMaskedLM.from_pretrained(tmp_path / "again"), st.SparseEncoder(str(tmp_path / "again"), device="cpu"))


def test_another_kind_of_folder_is_not_read(plain: Any, tmp_path: Path) -> None:
    """A BertModel of a cross-encoder's folder embeds by the mean, as SentenceTransformer does."""
    st.CrossEncoder(str(plain("Bert", "SequenceClassification")), device="cpu").save_pretrained(str(tmp_path))
    theirs = st.SentenceTransformer(str(tmp_path), device="cpu")
    ours = BertModel.from_pretrained(tmp_path)
    assert ours.sentence_modules is None
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), **TOLERANCE)
