"""Fused models over flattened inputs: each sequence gives what it gives alone in transformers' own model."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import bert_fast
from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT = {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 3, "dropout": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": {**SIZES, **NO_DROPOUT},
    "Roberta": {**SIZES, **NO_DROPOUT, "pad_token_id": 1},
    "XLMRoberta": {**SIZES, **NO_DROPOUT, "pad_token_id": 1},
    "Camembert": {**SIZES, **NO_DROPOUT, "pad_token_id": 1},
    "Electra": {**SIZES, **NO_DROPOUT, "embedding_size": 32},
    "DistilBert": {"vocab_size": 61, "max_position_embeddings": 40, **DISTILBERT},
}
LENGTHS = (7, 1, 30, 2, 13)  # together more than max_position_embeddings
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 4e-14 of 1 + |value|.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make(family: str, suffix: str = "Model", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**MODELS[family], "initializer_range": 0.15, **settings})
    return getattr(transformers, f"{family}{suffix}")(config).double().eval()


def sequences(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, 61, (n,), generator=draw) for n in lengths]


def flatten(rows: list[Tensor], *, boundaries: bool = True, positions: int | None = 0) -> dict[str, Any]:
    """What transformers' collator makes; with `positions` None no position_ids, otherwise those of the first token."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries, return_seq_idx=True)
    batch = dict(collator([{"input_ids": row.tolist()} for row in rows]))
    batch.pop("labels")
    given = batch.pop("position_ids")
    return batch if positions is None else {**batch, "position_ids": given + positions}


def alone(model: Any, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None]).last_hidden_state[0] for row in rows])[None]


# RoBERTa's own positions start at 2, behind the id of padding.
@pytest.mark.parametrize(
    ("family", "positions"),
    [(family, start) for family in MODELS for start in (None, 0, 2) if start != 2 or "pad_token_id" in MODELS[family]],
)
def test_each_sequence_is_as_alone(family: str, positions: int | None) -> None:
    theirs = make(family)
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    rows = sequences(*LENGTHS)
    inputs = flatten(rows, positions=positions)
    expected = alone(theirs, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ours(**inputs, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, expected, **EXACT)
    assert [tuple(states.shape) for states in out.hidden_states] == [(1, sum(LENGTHS), 48)] * 3
    if getattr(theirs, "pooler", None) is not None:
        first = torch.cat([theirs(input_ids=row[None]).pooler_output for row in rows])
        torch.testing.assert_close(out.pooler_output, first, **EXACT)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (out.last_hidden_state * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "implementation",
    [
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "kernels-community/flash-attn2",
        "kernels-community/vllm-flash-attn3@v1:flash_attn",
        "paged|flash_attention_2",
    ],
)
def test_positions_that_restart_separate_sequences_of_a_flash_attention(family: str, implementation: str) -> None:
    theirs = make(family)
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    ours.config._attn_implementation_internal = implementation
    assert ours.config._attn_implementation == implementation
    rows = sequences(*LENGTHS)
    first = 2 if "pad_token_id" in MODELS[family] else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for positions in {0, first}:
            out = ours(**flatten(rows, boundaries=False, positions=positions))
            torch.testing.assert_close(out.last_hidden_state, alone(theirs, rows), **EXACT)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=first // 2)
        mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
        out = ours(input_ids=padded, attention_mask=mask)
    torch.testing.assert_close(out.last_hidden_state[mask.bool()][None], alone(theirs, rows), **EXACT)


@pytest.mark.transformers_5  # what our forward leaves to transformers' fails there in version 4
def test_without_a_flash_attention_positions_alone_separate_nothing() -> None:
    """As in transformers, whose masks of encoders don't read them."""
    theirs = make("Bert")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    inputs = flatten(sequences(3, 9, 5), boundaries=False)
    torch.testing.assert_close(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state, **EXACT)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_hook_on_the_embeddings_and_a_replaced_pooler(wrap: bool) -> None:
    theirs = make("Bert")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    rows = sequences(*LENGTHS)
    if wrap:
        ours.embeddings.register_forward_hook(lambda *_: None)
        ours.pooler.register_forward_hook(lambda *_: None)
    out = ours(**flatten(rows))
    torch.testing.assert_close(out.last_hidden_state, alone(theirs, rows), **EXACT)
    first = torch.cat([theirs(input_ids=row[None]).pooler_output for row in rows])
    torch.testing.assert_close(out.pooler_output, first, **EXACT)


@pytest.mark.transformers_5  # what our forward leaves to transformers' fails there in version 4
def test_heads_over_flattened_inputs() -> None:
    rows = sequences(*LENGTHS)
    for suffix, joined in (
        ("ForMaskedLM", True),
        ("ForTokenClassification", True),
        ("ForSequenceClassification", False),
    ):
        theirs = make("Bert", suffix)
        logits = [theirs(input_ids=row[None]).logits for row in rows]
        expected = torch.cat(logits, dim=1 if joined else 0)
        out = bert_fast.fuse(copy.deepcopy(theirs))(**flatten(rows)).logits
        torch.testing.assert_close(out, expected, **EXACT)


def test_dropout_over_flattened_inputs() -> None:
    """The masks are those of a padded batch with the same tokens: dropout is drawn for packed tokens."""
    model = bert_fast.fuse(make("Bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    rows = sequences(*LENGTHS)
    torch.manual_seed(3)
    flat = model(**flatten(rows)).last_hidden_state
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    torch.manual_seed(3)
    padded = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(flat, padded[mask.bool()][None], **EXACT)
    assert not torch.equal(flat, model(**flatten(rows)).last_hidden_state)


def test_compiled() -> None:
    theirs = make("Bert")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    rows = sequences(*LENGTHS)
    out = torch.compile(ours, backend="eager", fullgraph=True)(**flatten(rows))
    torch.testing.assert_close(out.last_hidden_state, alone(theirs, rows), **EXACT)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one alone": ({"cu_seq_lens_k": None, "max_length_k": None}, "cu_seq_lens_q, max_length_q came alone; expected"),
    "a mask": ({"attention_mask": torch.ones(1, 53, dtype=torch.int64)}, "came with attention_mask"),
    "other keys": (
        {"cu_seq_lens_k": torch.tensor([0, 53], dtype=torch.int32)},
        "cu_seq_lens_q and cu_seq_lens_k differ",
    ),
    "floats": ({"cu_seq_lens_q": torch.tensor([0.0, 53.0])}, "no tensor of integers"),
    "too long": ({"max_length_q": 41}, "longer than config.max_position_embeddings allows"),
}


@pytest.mark.transformers_5  # what our forward leaves to transformers' fails there in version 4
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_left_to_transformers_is_named(wrong: str) -> None:
    changes, message = WRONG[wrong]
    theirs = make("Bert")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    inputs = {**flatten(sequences(*LENGTHS)), **changes}
    with pytest.warns(UserWarning, match=message):
        out = ours(**inputs)
    torch.testing.assert_close(out.last_hidden_state, theirs(**inputs).last_hidden_state, **EXACT)


@pytest.mark.transformers_5  # what our forward leaves to transformers' fails there in version 4
def test_boundaries_that_are_no_boundaries_are_named() -> None:
    ours = bert_fast.fuse(make("Bert"))
    inputs = flatten(sequences(*LENGTHS))
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.tensor([0, 9, 5, 53], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        ours(**inputs)
    with pytest.warns(UserWarning, match="cu_seq_lens_q came with 2 rows"):
        ours(**{**flatten(sequences(4, 4)), "input_ids": torch.ones(2, 4, dtype=torch.int64), "position_ids": None})


@pytest.mark.transformers_5
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_sentence_transformers_unpads_for_a_fused_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its set-up for a GPU, whose flash attention a fused model never calls."""
    library = pytest.importorskip if torch.cuda.is_available() else importlib.import_module
    st: Any = library("sentence_transformers")
    modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(56))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    make(family).float().save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path, model_max_length=38)
    poolings = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(48, pooling_mode=poolings)]
    model = st.SentenceTransformer(modules=parts, device="cpu")
    texts = ["w1 w2", "", "w3 w4 w5 w6", "w7 " * 50, "w8 w9"]
    expected = model.encode(texts)
    bert_fast.fuse(model)
    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention",
        lambda *_, **__: ((None, lambda *_, **__: pytest.fail("called"), None, None, None), (None, None)),
    )
    model[0].model.config._attn_implementation_internal = "flash_attention_2"
    model[0].unpad_inputs = None
    features = model.preprocess(texts)
    assert "cu_seq_lens_q" in features
    assert "attention_mask" not in features
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vectors = model.encode(texts)
    # float32 in another order through two layers: an eps or two of values of up to 10.
    torch.testing.assert_close(torch.tensor(vectors), torch.tensor(expected), rtol=0.0, atol=1e-5)
