"""`encode`: texts to vectors, in the order of the texts whatever the windows and batches, from any model."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

import bert_fast
from bert_fast.data import leading, load_tokenizer
from bert_fast.models import BertConfig, BertForSequenceClassification, BertModel, embedding
from bert_fast.models.embedding import encode

WORDS = [f"w{number}" for number in range(40)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("model")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=45, max_position_embeddings=32, **SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> BertModel:
    return BertModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def texts_of(count: int) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (count,), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(40, (n,), generator=draw).tolist()) for n in lengths]


def one_by_one(folder: Path, texts: list[str]) -> Tensor:
    """The mean of transformers' last hidden states, one text a call."""
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in texts]
        return torch.stack([theirs(**text).last_hidden_state[0].mean(0) for text in inputs])


@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
def test_vectors_are_those_of_each_text_alone_in_the_order_of_the_texts(
    folder: Path, model: BertModel, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "WINDOW", 7)
    texts = texts_of(30)
    vectors = model.encode(texts, batch_tokens=batch_tokens)
    assert (vectors.dtype, vectors.device.type) == (torch.float32, "cpu")
    # float32 in another order through two layers: the error is 4e-7, an eps or two of values of up to 2.5.
    torch.testing.assert_close(vectors, one_by_one(folder, texts), rtol=0.0, atol=1e-5)
    unit = model.encode(texts, normalize=True).numpy()
    # A float32 sum of 32 squares: at most 32 times half an eps, 2e-6.
    assert ((unit**2).sum(1)).tolist() == pytest.approx([1.0] * 30, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["transformers", "fused"])
def test_a_transformers_model_gives_the_same_vectors(
    folder: Path, model: BertModel, tokenizer: Tokenizer, fused: bool
) -> None:
    theirs: Any = transformers.BertModel.from_pretrained(folder).eval()
    if fused:
        bert_fast.fuse(theirs)
    for pooling in ("mean", "cls", "max", "pooler"):
        vectors = encode(theirs, tokenizer, texts_of(12), pooling=pooling, batch_tokens=60)
        expected = model.encode(texts_of(12), pooling=pooling)
        # float32 in another order through two layers: the error is 5e-7, an eps of values of up to 3.6.
        torch.testing.assert_close(vectors, expected, rtol=0.0, atol=1e-5, msg=pooling)


def test_only_a_window_of_texts_is_tokenized_at_once(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "WINDOW", 10)

    class Counted(list[str]):
        most = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.most = max(Counted.most, index.stop - index.start)
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            raise AssertionError("all texts at once")

    assert model.encode(Counted(texts_of(35))).shape == (35, 32)
    assert Counted.most == 10
    assert model.encode([]).shape == (0, 32)


def test_long_texts_have_the_vectors_of_their_first_tokens(
    folder: Path, model: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that a thread tokenizes ahead, and texts of which only a part is tokenized."""
    monkeypatch.setattr(embedding, "WINDOW", 4)
    texts = [" ".join(texts_of(count)) for count in (3, 40, 200, 1, 90, 60, 2, 30, 1000)]
    torch.testing.assert_close(model.encode(texts), one_by_one(folder, texts), rtol=0.0, atol=1e-5)  # as above
    assert torch.equal(model.encode(texts), model.encode(iter(texts)))


def test_errors_of_later_windows_are_raised_and_no_thread_stays(
    model: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "WINDOW", 2)
    texts: list[Any] = ["w1"] * 5
    with pytest.raises(TypeError, match=r"texts\[5\] is 7; expected a str"):
        model.encode([*texts, 7, *texts])

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ((embedding, "embed_ids"), (leading, "encode_leading")):  # the model, and the thread
        with monkeypatch.context() as patch:
            patch.setattr(*place, fails)
            with pytest.raises(KeyboardInterrupt):
                model.encode(texts)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert not model.training


def test_the_base_model_of_a_head_encodes(folder: Path, model: BertModel) -> None:
    classifier = BertForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(classifier.base_model.encode(["w1 w2"]), model.encode(["w1 w2"]), rtol=0.0, atol=0.0)


def test_a_progress_bar_counts_the_texts(
    model: BertModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.encode(texts_of(5))
    assert capsys.readouterr().err == ""
    model.encode(texts_of(5), show_progress_bar=True)
    assert "5/5" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        model.encode(["w1"], show_progress_bar=True)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pooling": "sum"}, ValueError, "pooling is 'sum'; expected one of cls, mean"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0; expected 1 or more"),
        ({"max_seqlen": 33}, ValueError, "max_seqlen is 33; expected 2 to 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(
    model: BertModel, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.encode(**{"texts": ["w1"], **arguments})


def test_a_missing_or_padding_tokenizer_is_an_error(folder: Path, model: BertModel, tmp_path: Path) -> None:
    padding = load_tokenizer(folder)
    padding.enable_padding()
    with pytest.raises(ValueError, match="the tokenizer pads or truncates"):
        model.encode(["w1"], tokenizer=padding)
    with pytest.raises(ValueError, match="not loaded by from_pretrained; pass a tokenizer to encode"):
        BertModel(model.config).encode(["w1"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer.json"):
        BertModel.from_pretrained(tmp_path).encode(["w1"])
