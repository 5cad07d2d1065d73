"""Folders of sentence-transformers: `encode` gives the vectors of its SentenceTransformer, or names what it lacks."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import bert_fast
from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.embedding import TextTokens, embed_ids, encode
from bert_fast.models.files import Source
from bert_fast.models.pooling import PRECISIONS, quantize_embeddings
from bert_fast.models.sentence import kind_of
from tests.models.conftest import in_threads

st: Any = (
    pytest.importorskip("sentence_transformers")
    if torch.cuda.is_available()
    else importlib.import_module("sentence_transformers")
)
modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")

WORDS = [f"w{number}" for number in range(40)]
E = 32
TEXTS = ["w1 w2", "", "w3", "w4 w5 w6 w7 w8 w9", "W1 w2 zz", "w5 " * 60, *(f"w{i} w{2 * i} w7" for i in range(12))]
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# float32 in another order through two layers: an eps or two of values of up to 10.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("plain")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (path / "vocab.txt").write_text((path / "vocab.txt").read_text() + "query\n:\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=47, max_position_embeddings=48, initializer_range=0.3, **sizes)  # type: ignore[arg-type]
    BertModel(config).save_pretrained(path)
    save_tokenizer(load_tokenizer(path), path, model_max_length=48)
    return path


@pytest.fixture
def saved(plain: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`saved(*modules, max_seq_length=..., **settings)`: a SentenceTransformer of these modules, and its folder."""

    def make(*parts: nn.Module, max_seq_length: int | None = None, **settings: Any) -> tuple[Any, Path]:
        arguments: dict[str, Any] = {} if max_seq_length is None else {"max_seq_length": max_seq_length}
        model = st.SentenceTransformer(
            modules=[modules.Transformer(str(plain), **arguments), *parts], device="cpu", **settings
        )
        folder = tmp_path / "saved"
        model.save_pretrained(str(folder))
        return st.SentenceTransformer(str(folder), device="cpu"), folder

    return make


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def pooling(*names: str, **options: Any) -> Any:
    return modules.Pooling(E, pooling_mode=names if len(names) > 1 else names[0], **options)


CHAINS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    **{name: lambda name=name: (pooling(name),) for name in POOLINGS},  # type: ignore[misc]
    "all poolings": lambda: (pooling(*reversed(POOLINGS)),),
    "normalized": lambda: (pooling("cls"), modules.Normalize()),
    "dense": lambda: (pooling("mean"), modules.Dense(E, 24)),
    "dense without bias": lambda: (
        pooling("mean", "max"),
        modules.Dense(2 * E, 8, bias=False, activation_function=nn.Identity()),
    ),
    "gelu, then normalized": lambda: (
        pooling("mean"),
        modules.Dense(E, 24, activation_function=nn.GELU()),
        modules.Normalize(),
    ),
    "residual": lambda: (pooling("mean"), modules.Dense(E, E, use_residual=True)),
    "projected residual": lambda: (pooling("mean"), modules.Dense(E, 9, use_residual=True)),
    "layer norm": lambda: (pooling("mean"), modules.LayerNorm(E), modules.Dropout(0.5)),
    "dense of tokens": lambda: (
        modules.Dense(E, 8, activation_function=nn.Identity(), module_input_name="token_embeddings"),
        modules.Pooling(8, pooling_mode="max"),
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_vectors_are_those_of_the_folders_modules(saved: Any, chain: str) -> None:
    torch.manual_seed(1)
    theirs, folder = saved(*CHAINS[chain](), max_seq_length=17)
    ours = BertModel.from_pretrained(folder)
    expected = theirs.encode(TEXTS)
    vectors = ours.encode(TEXTS, convert_to_numpy=True)
    assert vectors.dtype == expected.dtype
    np.testing.assert_allclose(vectors, expected, **TOLERANCE)
    np.testing.assert_allclose(ours.encode(TEXTS[3]), theirs.encode(TEXTS[3]), **TOLERANCE)
    assert ours.encode([]).shape == (0, expected.shape[1])
    copied = pickle.loads(pickle.dumps(ours))
    assert torch.equal(copied.encode(TEXTS), ours.encode(TEXTS))  # type: ignore[arg-type]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_saved_model_gives_the_same_vectors_in_both_libraries(saved: Any, chain: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, folder = saved(*CHAINS[chain](), max_seq_length=17, prompts={"query": "query: "}, default_prompt_name="query")
    ours = BertModel.from_pretrained(folder)
    expected = ours.encode(TEXTS)
    ours.save_pretrained(tmp_path / "ours")
    shutil.rmtree(folder)
    assert torch.equal(BertModel.from_pretrained(tmp_path / "ours").encode(TEXTS), expected)  # type: ignore[arg-type]
    theirs = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, **TOLERANCE)
    ours.save_pretrained(tmp_path / "again")  # the tokenizer's folder is gone; the rest is whole
    assert json.loads((tmp_path / "again" / "modules.json").read_text())[1]["path"] == "1_Pooling" or chain.endswith(
        "tokens"
    )


def test_a_tokenizer_that_is_there_stays(saved: Any, tmp_path: Path) -> None:
    _, folder = saved(pooling("max"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "vocab.txt").write_text("own")
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "vocab.txt").read_text() == "own"
    assert not (tmp_path / "own" / "tokenizer.json").exists()
    assert (tmp_path / "own" / "1_Pooling" / "config.json").exists()


def test_an_explicit_pooling_is_the_only_module(saved: Any) -> None:
    torch.manual_seed(1)
    _, folder = saved(pooling("cls"), modules.Dense(E, 8), modules.Normalize(), max_seq_length=17)
    ours = BertModel.from_pretrained(folder)
    expected = st.SentenceTransformer(modules=[modules.Transformer(str(folder), max_seq_length=17), pooling("max")])
    np.testing.assert_allclose(ours.encode(TEXTS, pooling="max"), expected.encode(TEXTS), **TOLERANCE)
    both = ours.encode(TEXTS, pooling=["cls", "max"])
    assert both.shape == (len(TEXTS), 2 * E)
    assert torch.equal(both[:, E:], ours.encode(TEXTS, pooling="max"))  # type: ignore[arg-type]


# Lengths


def lengths(model: BertModel, **options: Any) -> int:
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["max_seqlen"]), with_kwargs=True)
    model.encode("w1 " * 60, **options)
    handle.remove()
    return seen[0]


def test_the_maximum_length_is_that_of_sentence_transformers(saved: Any) -> None:
    _, folder = saved(pooling("mean"))

    def both(settings: dict[str, Any] | None, model_max_length: Any) -> tuple[int, int]:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer.pop("model_max_length", None)
        tokenizer |= {} if model_max_length is None else {"model_max_length": model_max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings or {"do_lower_case": False}))
        theirs = st.SentenceTransformer(str(folder), device="cpu")
        ours = lengths(BertModel.from_pretrained(folder, add_pooling_layer=False))
        return ours, theirs.tokenize(["w1 " * 60])["input_ids"].shape[1]

    for settings, stored, expected in (
        ({"max_seq_length": 12}, 48, 12),
        ({"max_seq_length": 12}, None, 12),
        ({"max_seq_length": 30}, 14, 30),
        (None, 14, 14),
        ({"max_seq_length": None}, 14, 14),
        (None, 10**30, 48),
        (None, None, 48),
    ):
        assert both(settings, stored) == (expected, expected), (settings, stored)


def test_the_truncation_of_the_tokenizer_file_does_not_count(saved: Any) -> None:
    _, folder = saved(pooling("mean"), max_seq_length=20)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    assert theirs.tokenize(["w1 " * 60])["input_ids"].shape[1] == 20
    assert lengths(BertModel.from_pretrained(folder)) == 20


def test_an_argument_replaces_the_length_and_task_lengths_are_followed(saved: Any) -> None:
    theirs, folder = saved(pooling("mean"), max_seq_length=20)
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "query_length": 9, "document_length": 13}))
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = BertModel.from_pretrained(folder)
    assert [lengths(ours), lengths(ours, task="query"), lengths(ours, task="document")] == [20, 9, 13]
    assert lengths(ours, task="query", max_seqlen=30) == 30
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), **TOLERANCE)
    np.testing.assert_allclose(ours.encode_document(TEXTS), theirs.encode_document(TEXTS), **TOLERANCE)


# Prompts and case

PROMPTS = {"query": "query: ", "passage": "w9 w8 ", "none": ""}


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("default", [None, "passage"])
def test_prompts(saved: Any, include_prompt: bool, default: str | None) -> None:
    parts = (pooling(*POOLINGS, include_prompt=include_prompt),)
    theirs, folder = saved(*parts, max_seq_length=17, prompts=PROMPTS, default_prompt_name=default)
    ours = BertModel.from_pretrained(folder)
    for options in ({}, {"prompt": "w3 w4: "}, {"prompt": ""}, *({"prompt_name": name} for name in PROMPTS)):
        np.testing.assert_allclose(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options), **TOLERANCE)
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), **TOLERANCE)
    np.testing.assert_allclose(ours.encode_document(TEXTS), theirs.encode_document(TEXTS), **TOLERANCE)
    plain = ours.encode(TEXTS, prompt="")
    assert float((ours.encode(TEXTS, prompt_name="query") - plain).abs().max()) > 0.1  # type: ignore[operator]
    assert (float((ours.encode(TEXTS) - plain).abs().max()) > 0.1) == (default is not None)  # type: ignore[operator]


def test_ids_of_texts_with_several_prompts_in_one_batch(saved: Any) -> None:
    """What a server does: token ids of many requests, each with a prompt of its own, and their vectors."""
    parts = (pooling(*POOLINGS, include_prompt=False), modules.Normalize())
    theirs, folder = saved(*parts, max_seq_length=17, prompts=PROMPTS)
    ours = BertModel.from_pretrained(folder)
    chosen = ours.modules_of_texts
    expected, ids, lengths = [], [], []
    for name in PROMPTS:
        tokens = TextTokens.of(ours, ours.source_tokenizer(), chosen, prompt_name=name)
        ids += tokens(TEXTS)
        lengths += [tokens.prompt_length] * len(TEXTS)
        expected.append(theirs.encode(TEXTS, prompt_name=name))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    vectors = embed_ids(ours, [ids[i] for i in order], modules=chosen, prompt_length=[lengths[i] for i in order])
    np.testing.assert_allclose(vectors, np.concatenate(expected)[order], **TOLERANCE)
    cut = embed_ids(ours, ids[:3], modules=chosen, prompt_length=lengths[:3], truncate_dim=5, normalize=True)
    np.testing.assert_allclose(torch.linalg.vector_norm(cut, dim=1), 1.0, rtol=1e-6)
    assert cut.shape == (3, 5)
    assert embed_ids(ours, [], modules=chosen).shape == (0, 6 * E)


def test_the_kind_of_a_folder(saved: Any, plain: Path, tmp_path: Path) -> None:
    _, folder = saved(pooling("mean"))

    def kind(path: Path, **settings: Any) -> str:
        return kind_of(Source(path), BertConfig.from_pretrained(path, **settings))

    assert kind(folder) == "SentenceTransformer"
    assert kind(plain) == "encoder"
    edit(folder / "config_sentence_transformers.json", lambda c: {**c, "model_type": "CrossEncoder"})
    assert kind(folder) == "CrossEncoder"
    (folder / "modules.json").unlink()
    assert kind(folder) == "encoder"
    assert kind(plain, architectures=["BertForSequenceClassification"], num_labels=1) == "CrossEncoder"
    assert kind(plain, architectures=["BertForSequenceClassification"], num_labels=2) == "encoder"
    edit(folder / "config.json", lambda c: {**c, "bert_fast_task": {"name": "regression"}})
    assert kind(folder) == "regression"


def test_a_prompt_that_leaves_no_token_is_named(saved: Any) -> None:
    _, folder = saved(pooling("mean", include_prompt=False), max_seq_length=8)
    ours = BertModel.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    with pytest.raises(ValueError, match="the text 'w1' has no tokens beside the 8 of the prompt"):
        ours.encode(["w1"], tokenizer=tokenizer, prompt="w2 " * 20)


@pytest.mark.parametrize("lower", [True, False])
def test_texts_in_lower_case(saved: Any, lower: bool) -> None:
    theirs, folder = saved(pooling("mean"))
    edit(folder / "sentence_bert_config.json", lambda c: {**c, "do_lower_case": lower})
    edit(folder / "tokenizer.json", lambda c: {**c, "normalizer": None})
    edit(folder / "tokenizer_config.json", lambda c: {**c, "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    ours = BertModel.from_pretrained(folder)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), **TOLERANCE)
    same = torch.allclose(ours.encode("W1 W2"), ours.encode("w1 w2"), atol=1e-4)  # type: ignore[arg-type]
    assert same == lower


# Fewer components and fewer bits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("normalize", [False, True])
def test_truncated_and_quantized_vectors(saved: Any, precision: str, normalize: bool) -> None:
    theirs, folder = saved(pooling("mean"), truncate_dim=21)
    ours = BertModel.from_pretrained(folder)
    for dim in (None, 13):
        options = {"truncate_dim": dim, "normalize_embeddings": normalize}
        expected = theirs.encode(TEXTS, **options)
        vectors = ours.encode(TEXTS, **options)
        np.testing.assert_allclose(vectors, expected, **TOLERANCE)
        quantized = ours.encode(TEXTS, precision=precision, **options)
        ranges = st.util.quantize_embeddings(vectors.numpy(), precision=precision)  # type: ignore[union-attr]
        assert torch.equal(quantized, torch.from_numpy(ranges))  # type: ignore[arg-type]
        array = theirs.encode(TEXTS, precision=precision, **options)
        assert quantized.numpy().dtype == array.dtype  # type: ignore[union-attr]
        assert quantized.shape == array.shape


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantization_is_that_of_sentence_transformers(precision: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 37)).astype(np.float32)
    vectors[:, 5] = 1.0  # a constant component
    vectors[7] = 0.0
    expected = st.util.quantize_embeddings(vectors, precision=precision)
    assert (quantize_embeddings(vectors, precision) == expected).all()
    ranges = np.stack([np.full(37, -1.0), np.full(37, 0.5)])
    expected = st.util.quantize_embeddings(vectors[:1], precision=precision, ranges=ranges)
    assert (quantize_embeddings(vectors[:1], precision, ranges) == expected).all()
    assert len(quantize_embeddings(vectors[:0], precision)) == 0


def test_one_vector_has_no_ranges(saved: Any) -> None:
    _, folder = saved(pooling("mean"))
    ours = BertModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="precision is 'int8' and there is a single vector"):
        ours.encode("w1", precision="int8")
    assert ours.encode("w1", precision="ubinary").shape == (4,)


# What is refused


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another module": (
        lambda f: edit(
            f / "modules.json", lambda m: [*m, {"path": "2_CNN", "type": "sentence_transformers.models.CNN"}]
        ),
        r"modules\.json: the module 'sentence_transformers\.models\.CNN' is not supported",
    ),
    "other code": (
        lambda f: edit(f / "modules.json", lambda m: [m[0], {"path": "1_Pooling", "type": "custom.Pooling"}]),
        "the module 'custom.Pooling' is not supported",
    ),
    "no pooling": (lambda f: edit(f / "modules.json", lambda m: m[:1]), "there is no Pooling module"),
    "no module": (lambda f: (f / "modules.json").write_text("[]"), "the first module is no module"),
    "no list": (lambda f: (f / "modules.json").write_text("{}"), r"modules\.json is no list of modules"),
    "no JSON": (lambda f: (f / "modules.json").write_text("["), r"modules\.json is not valid JSON"),
    "a path outside": (
        lambda f: edit(f / "modules.json", lambda m: [m[0], {**m[1], "path": "../1_Pooling"}]),
        r"modules\.json names the file \"\.\./1_Pooling\"",
    ),
    "an unknown pooling": (
        lambda f: edit(f / "1_Pooling/config.json", lambda c: {**c, "pooling_mode": "median"}),
        "pooling is 'median'",
    ),
    "a length": (
        lambda f: edit(f / "sentence_bert_config.json", lambda c: {**c, "max_seq_length": "long"}),
        "the maximum length is 'long'; expected 2 or more tokens",
    ),
    "a head": (
        lambda f: edit(f / "sentence_bert_config.json", lambda c: {**c, "transformer_task": "fill-mask"}),
        "the Transformer module is for 'fill-mask'",
    ),
    "an absent prompt": (
        lambda f: edit(f / "config_sentence_transformers.json", lambda c: {**c, "default_prompt_name": "x"}),
        "default_prompt_name is 'x', and there is no prompt of this name",
    ),
    "an activation": (
        lambda f: edit(f / "2_Dense/config.json", lambda c: {**c, "activation_function": "os.system"}),
        "2_Dense: the activation function is 'os.system'; expected one of torch.nn",
    ),
    "no activation": (
        lambda f: edit(f / "2_Dense/config.json", lambda c: {**c, "activation_function": "torch.nn.Linear"}),
        "the activation function is 'torch.nn.Linear'",
    ),
    "another width": (
        lambda f: edit(f / "2_Dense/config.json", lambda c: {**c, "out_features": 9}),
        r"2_Dense has the tensors .*; expected .*9",
    ),
    "no weights": (lambda f: (f / "2_Dense/model.safetensors").unlink(), r"2_Dense has no model\.safetensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_when_texts_are_embedded(saved: Any, wrong: str) -> None:
    _, folder = saved(pooling("mean"), modules.Dense(E, 8))
    change, message = WRONG[wrong]
    change(folder)
    model = BertModel.from_pretrained(folder)
    model(torch.tensor([[2, 5, 3]]))
    with pytest.raises(ValueError, match=message):
        model.encode(TEXTS)
    assert model.encode(TEXTS, pooling="mean").shape == (len(TEXTS), E)


JUNK = (None, True, -1, 0, 2**70, 1.5, float("inf"), "", "x", [], ["x", 1], {}, {"x": None})


def test_any_value_in_any_file_is_read_or_refused(saved: Any) -> None:
    """With ValueError or TypeError, by one sentence: never another error of ours, and never a crash."""
    _, folder = saved(pooling("mean"), modules.Dense(E, 8), prompts=PROMPTS, max_seq_length=17)
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    paths = [folder / name for name in (*names, "1_Pooling/config.json", "2_Dense/config.json")]
    settings = ("max_seq_length", "processor_kwargs", "modality_config", "query_length", "query_expansion")
    read, refused = 0, []
    for path in paths:
        text = path.read_text()
        values = json.loads(text)
        entries = values if isinstance(values, list) else [values]
        extra = settings if path.name == names[1] else ("default_prompt_name", "truncate_dim", "model_type")
        for entry in entries:
            for key in {*entry, *(extra if path.parent == folder and entry is values else ())}:
                before = entry.get(key)
                for junk in JUNK:
                    entry[key] = junk
                    path.write_text(json.dumps(values))
                    try:
                        BertModel.from_pretrained(folder, add_pooling_layer=False).encode(TEXTS[:3])
                        read += 1
                    except (ValueError, TypeError) as error:
                        refused.append(str(error))
                entry[key] = before
        path.write_text(text)
    assert min(read, len(refused)) > 50
    # Python's own messages, which name no file and no setting.
    ours = [text for text in refused if not re.search(r"\n|' object|not supported between|unhashable|argument", text)]
    assert sorted(set(refused) - set(ours)) == []


def test_a_pickled_dense_needs_permission(saved: Any) -> None:
    theirs, folder = saved(pooling("mean"), modules.Dense(E, 8))
    torch.save(theirs[2].state_dict(), folder / "2_Dense/pytorch_model.bin")
    (folder / "2_Dense/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only a pickled pytorch_model\.bin; pass allow_pickle=True"):
        BertModel.from_pretrained(folder).encode(TEXTS)
    vectors = BertModel.from_pretrained(folder, allow_pickle=True).encode(TEXTS)
    np.testing.assert_allclose(vectors, theirs.encode(TEXTS), **TOLERANCE)


# Other layouts and models


def test_a_transformer_in_a_folder_of_its_own(saved: Any, tmp_path: Path) -> None:
    theirs, folder = saved(pooling("cls"), modules.Normalize(), max_seq_length=17)
    expected = theirs.encode(TEXTS)
    old = tmp_path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    for path in folder.iterdir():
        top = path.is_dir() or path.name in ("modules.json", "config_sentence_transformers.json")
        path.rename((old if top else old / "0_Transformer") / path.name)
    edit(old / "modules.json", lambda m: [{**m[0], "path": "0_Transformer"}, *m[1:]])
    np.testing.assert_allclose(st.SentenceTransformer(str(old), device="cpu").encode(TEXTS), expected, **TOLERANCE)
    ours = BertModel.from_pretrained(old)
    assert BertConfig.from_pretrained(old) == ours.config
    np.testing.assert_allclose(ours.encode(TEXTS), expected, **TOLERANCE)
    ours.save_pretrained(tmp_path / "new")
    np.testing.assert_allclose(BertModel.from_pretrained(tmp_path / "new").encode(TEXTS), expected, **TOLERANCE)
    theirs = st.SentenceTransformer(str(tmp_path / "new"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, **TOLERANCE)


def test_old_settings_of_the_pooling(saved: Any) -> None:
    _, folder = saved(pooling("mean"))
    names = ("max_tokens", "cls_token", "mean_sqrt_len_tokens", "lasttoken", "weightedmean_tokens")
    for chosen in ((), ("cls_token",), ("max_tokens", "cls_token"), names):
        values = {f"pooling_mode_{name}": name in chosen for name in (*names, "mean_tokens")}
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": E, **values}))
        theirs = st.SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(BertModel.from_pretrained(folder).encode(TEXTS), theirs.encode(TEXTS), **TOLERANCE)


def test_a_folder_without_modules_is_the_mean(plain: Path) -> None:
    theirs = st.SentenceTransformer(str(plain), device="cpu")
    np.testing.assert_allclose(BertModel.from_pretrained(plain).encode(TEXTS), theirs.encode(TEXTS), **TOLERANCE)


FAMILIES: dict[str, dict[str, Any]] = {
    "Roberta": {"pad_token_id": 1},
    "XLMRoberta": {"pad_token_id": 1},
    "Camembert": {"pad_token_id": 1},
    "Electra": {"embedding_size": 16},
    "DistilBert": {"dim": E, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_family(family: str, plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 47, "max_position_embeddings": 50, "initializer_range": 0.3}
    layers = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = {**sizes, **(layers if family != "DistilBert" else {}), **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(**settings)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "start")
    save_tokenizer(load_tokenizer(plain), tmp_path / "start", model_max_length=48)
    parts = [modules.Transformer(str(tmp_path / "start")), pooling(*POOLINGS), modules.Normalize()]
    theirs = st.SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS)
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours = BertModel.from_pretrained(tmp_path / "saved")
    # Their tokenizer's [UNK] has the id of these models' padding token, whose positions differ in a padded batch.
    texts = [text for text in TEXTS if "zz" not in text]
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), **TOLERANCE)
    np.testing.assert_allclose(ours.encode_query(texts), theirs.encode_query(texts), **TOLERANCE)


@pytest.mark.parametrize("chain", ["all poolings", "dense", "dense of tokens"])
def test_fused_sentence_transformers(saved: Any, chain: str) -> None:
    torch.manual_seed(1)
    options = {"max_seq_length": 17, "prompts": PROMPTS, "default_prompt_name": "passage"}
    theirs, _ = saved(*CHAINS[chain](), **options)
    expected = theirs.encode(TEXTS)
    bert_fast.fuse(theirs)
    assert bert_fast.is_fused(theirs)
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, **TOLERANCE)


def test_transformers_models_take_the_modules_too(saved: Any) -> None:
    theirs, folder = saved(pooling("weightedmean", "max"), max_seq_length=17)
    model = transformers.BertModel.from_pretrained(folder).eval()
    chosen = BertModel.from_pretrained(folder).modules_of_texts
    vectors = encode(model, load_tokenizer(folder), TEXTS, modules=chosen)
    np.testing.assert_allclose(vectors, theirs.encode(TEXTS), **TOLERANCE)


def test_threads_share_the_modules(saved: Any) -> None:
    _, folder = saved(pooling("mean"), modules.Dense(E, 8), modules.Normalize())
    model = BertModel.from_pretrained(folder)
    results = in_threads(lambda: model.encode(TEXTS))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("subfolder", ["", "models/one"])
@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_a_repository_of_the_hub(
    saved: Any, tmp_path: Path, subfolder: str, transformer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = saved(pooling("cls"), modules.Dense(E, 8), max_seq_length=17, prompts=PROMPTS)
    if transformer:
        (folder / transformer).mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            if path.name not in ("modules.json", "config_sentence_transformers.json"):
                path.rename(folder / transformer / path.name)
        edit(folder / "modules.json", lambda m: [{**m[0], "path": transformer}, *m[1:]])
    root = tmp_path / "hub"
    shutil.move(folder, root / subfolder)
    asked: list[str] = []

    def download(name: str, filename: str, subfolder: str = "", revision: str | None = None) -> str:
        assert (name, revision) == ("someone/model", "v1")
        asked.append(f"{subfolder}/{filename}" if subfolder else filename)
        if not (path := root / subfolder / filename).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours = BertModel.from_pretrained("someone/model", revision="v1", subfolder=subfolder)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), **TOLERANCE)
    assert all(name.startswith(subfolder) for name in asked)
    ours.save_pretrained(tmp_path / "copy")
    np.testing.assert_allclose(BertModel.from_pretrained(tmp_path / "copy").encode(TEXTS), ours.encode(TEXTS))
