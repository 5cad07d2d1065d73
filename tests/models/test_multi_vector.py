"""Late interaction: vectors of tokens are those of sentence-transformers' MultiVectorEncoder, MaxSim is its formula."""

from __future__ import annotations

import importlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer
from bert_fast.models import BertConfig, BertModel, MultiVectorModel, maxsim

st: Any = (
    pytest.importorskip("sentence_transformers")
    if torch.cuda.is_available()
    else importlib.import_module("sentence_transformers")
)
pytestmark = pytest.mark.transformers_5  # sentence-transformers has MultiVectorEncoder since it needs transformers 5

E = 32
WORDS = [f"w{number}" for number in range(30)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
TEXTS = ["w1 w2, w3.", "", "w7", "w4 w5 ! w6 w7 w8 w9 zz", "w5 w6 - " * 30, *(f"w{i} ; w{i + 3} w2" for i in range(9))]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # float32 in another order through two layers, vectors of length 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    (path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, *string.punctuation]) + "\n")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": E,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    size = len(SPECIAL) + len(WORDS) + len(string.punctuation)
    config = BertConfig(vocab_size=size, max_position_embeddings=48, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(path)
    save_tokenizer(load_tokenizer(path), path, model_max_length=48)
    return path


def saved(plain: Path, folder: Path, *, skiplist: list[str] | None = None, **options: Any) -> Path:
    """The folder of a MultiVectorEncoder."""
    modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    mask: Any = importlib.import_module("sentence_transformers.multi_vector_encoder.modules")
    prompts = options.pop("prompts", None)
    tasks = options.pop("skiplist_tasks", None)
    torch.manual_seed(1)
    names = {"bias": False, "activation_function": torch.nn.Identity(), "module_input_name": "token_embeddings"}
    model = st.MultiVectorEncoder(
        modules=[
            modules.Transformer(str(plain), **options),
            modules.Dense(E, 12, **names),
            mask.MultiVectorMask(skiplist, skiplist_tasks=tasks),
            modules.Normalize(module_input_name="token_embeddings"),
        ],
        prompts=prompts,
        device="cpu",
    )
    model.save_pretrained(str(folder))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_pylate(folder: Path, **settings: Any) -> Path:
    """The folder as PyLate 3 writes it: Transformer and Dense alone, everything else among the settings."""
    entries = json.loads((folder / "modules.json").read_text())[:2]
    entries[1]["type"] = "pylate.models.Dense.Dense"
    (folder / "modules.json").write_text(json.dumps(entries))
    dense = folder / entries[1]["path"] / "config.json"
    kept = {name: x for name, x in json.loads(dense.read_text()).items() if not name.startswith("module_")}
    dense.write_text(json.dumps(kept))
    edit(folder / "config_sentence_transformers.json", model_type="ColBERT", **settings)
    return folder


def check_equal(folder: Path) -> None:
    theirs, ours = st.MultiVectorEncoder(str(folder), device="cpu"), MultiVectorModel.from_pretrained(folder)
    for task in ("query", "document"):
        expected = getattr(theirs, f"encode_{task}")(TEXTS)
        own: Any = getattr(ours, f"encode_{task}")(TEXTS)
        assert [x.shape for x in own] == [x.shape for x in expected]
        for x, y in zip(own, expected, strict=True):
            torch.testing.assert_close(x, y, **TOLERANCE)
        torch.testing.assert_close(getattr(ours, f"encode_{task}")(TEXTS[3]), expected[3], **TOLERANCE)
        assert not own[0].is_inference()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompts and lengths": {
        "prompts": {"query": "w1 w1 ", "document": "w2 "},
        "query_length": 9,
        "document_length": 17,
    },
    "punctuation": {"skiplist": list(string.punctuation)},
    "punctuation of both": {"skiplist": [",", "nowhere"], "skiplist_tasks": ["query", "document"]},
    "expansion": {"query_expansion": {"strategy": "fixed", "attend": False, "length": 12}},
    "expansion that is attended to": {"query_expansion": {"strategy": "fixed", "attend": True, "length": 12}},
    "a shortest length": {"query_expansion": {"strategy": "min", "attend": False, "length": 12}},
    "a token": {"query_expansion": {"strategy": "min", "attend": True, "length": 7, "token": "w3"}, "query_length": 9},
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_the_multi_vector_encoder(case: str, plain: Path, tmp_path: Path) -> None:
    check_equal(saved(plain, tmp_path / "saved", **CASES[case]))


PYLATE: dict[str, dict[str, Any]] = {
    "defaults": {"query_length": 10, "document_length": 20},
    "prefixes in the vocabulary": {
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "query_length": 8,
        "attend_to_expansion_tokens": True,
    },
    "prefixes as text": {"query_prefix": "[Q] ", "document_prefix": "[D] ", "do_query_expansion": False},
    "words": {"skiplist_words": ["w2"], "query_length": 40},
}


@pytest.mark.parametrize("case", PYLATE)
def test_folders_of_pylate_are_read_as_sentence_transformers_reads_them(case: str, plain: Path, tmp_path: Path) -> None:
    check_equal(as_pylate(saved(plain, tmp_path / "saved"), **PYLATE[case]))


def test_a_prefix_is_the_second_token(plain: Path, tmp_path: Path) -> None:
    """As ColBERT's authors write it: [CLS] [Q] query [SEP] [MASK] ..."""
    folder = as_pylate(saved(plain, tmp_path / "saved"), **PYLATE["prefixes in the vocabulary"])
    model = MultiVectorModel.from_pretrained(folder)
    ids = [SPECIAL.index("[CLS]"), SPECIAL.index("[unused0]"), len(SPECIAL) + 1, SPECIAL.index("[SEP]")]
    ids += [SPECIAL.index("[MASK]")] * 4
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    weight = model.modules.texts.token_steps[0].linear.weight  # type: ignore[union-attr]
    expected = torch.nn.functional.normalize(hidden @ weight.T, dim=-1)
    torch.testing.assert_close(model.encode_query("w1"), expected.detach(), **TOLERANCE)


def test_maxsim_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    queries = [torch.randn(n, 8) for n in (3, 1, 6, 0)]
    documents = [torch.randn(n, 8) for n in (5, 0, 1, 17)]
    expected = np.zeros((4, 4))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            if len(query) and len(document):
                expected[i, j] = (query.double().numpy() @ document.double().numpy().T).max(axis=1).sum()
    np.testing.assert_allclose(maxsim(queries, documents), expected, rtol=1e-5, atol=1e-5)
    lengths = np.array([[3.0], [1.0], [6.0], [1.0]])
    np.testing.assert_allclose(maxsim(queries, documents, normalize=True), expected / lengths, rtol=1e-5, atol=1e-5)
    assert maxsim([], documents).shape == (0, 4)


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        (torch.ones(2, 3), [torch.ones(2, 3)], "queries is of type Tensor"),
        ([torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(2, 4)], r"documents\[1\] has shape \(2, 4\)"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"documents\[0\] has shape \(3,\)"),
        ([torch.ones(2, 3, dtype=torch.int64)], [], r"queries\[0\] is of type Tensor; expected a floating"),
    ],
)
def test_maxsim_refuses(queries: Any, documents: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        maxsim(queries, documents)


def test_a_single_vector_model_and_a_multi_vector_folder_are_kept_apart(plain: Path, tmp_path: Path) -> None:
    folder = saved(plain, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"load it with bert_fast\.models\.MultiVectorModel"):
        BertModel.from_pretrained(folder).encode("w1")
    with pytest.raises(ValueError, match="task is 'passage'"):
        MultiVectorModel.from_pretrained(folder).encode("w1", task="passage")
    edit(folder / "config_sentence_transformers.json", model_type="SentenceTransformer")
    with pytest.raises(ValueError, match="model of the type 'SentenceTransformer'"):
        MultiVectorModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"has no modules\.json"):
        MultiVectorModel.from_pretrained(plain)


def test_a_wrong_expansion_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = saved(plain, tmp_path / "saved")
    edit(folder / "sentence_bert_config.json", query_expansion={"strategy": "fixed", "length": 0})
    with pytest.raises(ValueError, match=r"query_expansion is .* expected strategy"):
        MultiVectorModel.from_pretrained(folder)
    edit(folder / "sentence_bert_config.json", query_expansion={"strategy": "fixed", "length": 9, "token": "none"})
    with pytest.raises(ValueError, match="expanded by none, which the tokenizer"):
        MultiVectorModel.from_pretrained(folder)
