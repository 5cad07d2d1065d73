"""Planted faults of encoders: each breaks the invariants that it should, and is named. Right encoders break none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.invariants import Reference, check_encoder, check_hidden, load_subject
from bert_fast.invariants.checks import EMPTY, TEXTS
from bert_fast.invariants.faults import distance
from bert_fast.invariants.models import LIBRARIES
from tests.invariants.conftest import Planted

BATCHED = {"batch composition", "order", "padding beside a longer text"}
ALL = {"values", "empty text", "truncation", *BATCHED}
# The fault, the model, the invariants that break, and the name that one of them gives at least.
FAULTS = [
    ("tanh", "bert", ALL, "tanh and erf GeLU are exchanged"),
    ("types", "bert", ALL, "the token types are dropped"),
    ("cls", "bert", ALL, "cls pooling in place of mean pooling"),
    ("length", "bert", {"truncation"}, "the maximum length is 32, not 128"),
    ("flattened", "bert", BATCHED, "positions run on over the texts of the batch"),
    ("padding", "bert", BATCHED, "padding is pooled"),
    ("attended", "bert", BATCHED, "padding is attended to"),
    ("offset", "roberta", ALL, "positions are shifted by -2"),
    ("special", "bert", ALL - {"empty text"}, "special tokens are left out"),
    ("case", "roberta", {"values"}, "the text is converted to lower case"),
    ("sorted", "bert", BATCHED, ""),
    ("random", "bert", {*ALL, "repetition"}, "it is not deterministic"),
]


@pytest.mark.parametrize(("fault", "model_type", "broken", "name"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_planted_fault_is_caught_and_named(
    model_folder: Any, fault: str, model_type: str, broken: set[str], name: str
) -> None:
    reference = Reference(model_folder(model_type))
    rows = list(check_encoder(Planted(reference, fault), reference))
    failed = {row.invariant for row in rows if not row.ok}
    assert broken <= failed, rows
    if fault != "random":
        assert "repetition" not in failed
    if broken == BATCHED:
        assert failed == BATCHED  # a text alone is right
    if name:
        mistakes = [row.finding.mistake for row in rows if row.finding is not None]
        assert name in mistakes, mistakes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_right_encoders_break_nothing(model_folder: Any, model_type: str, seed: int) -> None:
    """Also with other weights: the bound follows eager PyTorch's error."""
    reference = Reference(model_folder(model_type))
    torch.manual_seed(seed)
    for parameter in reference.model.parameters():
        parameter.data = parameter.data.float().mul_(1 + 0.1 * torch.randn(parameter.shape)).double()
    subject = load_subject(model_folder(model_type), "transformers", reference)
    subject.model.load_state_dict(reference.model.state_dict())
    rows = [*check_encoder(subject, reference), *check_hidden(subject.hidden, reference, layouts=subject.layouts)]
    assert [row for row in rows if not row.ok] == []
    assert len(rows) == 10


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_every_library_keeps_the_invariants(
    model_folder: Any, model_type: str, dtype: torch.dtype, library: str
) -> None:
    """In a folder of sentence-transformers: its pooling, its maximum length, unit vectors."""
    folder = model_folder(model_type, pooling="mean_tokens", max_seq_length=48, normalize=True)
    reference = Reference(folder)
    assert (reference.max_seqlen, reference.normalize, reference.pooling) == (48, True, "mean")
    subject = load_subject(folder, library, reference, dtype)
    rows = list(check_encoder(subject, reference, dtype=dtype))
    if subject.layouts:
        rows += check_hidden(subject.hidden, reference, dtype=dtype, layouts=subject.layouts)
    assert [row for row in rows if not row.ok] == []
    assert max(row.distance for row in rows) > 0


def test_the_reference_is_sentence_transformers_in_float64(model_folder: Any) -> None:
    """Two independent readings of the folder: this one, and that library's."""
    from sentence_transformers import SentenceTransformer

    for pooling, normalize in (("cls_token", False), ("mean_tokens", True), ("max_tokens", False)):
        folder = model_folder("bert", pooling=pooling, max_seq_length=40, normalize=normalize)
        reference = Reference(folder)
        theirs = SentenceTransformer(str(folder), device="cpu").double()
        for text in (*TEXTS, *EMPTY, "many words " * 100):
            expected = theirs.encode(text, convert_to_tensor=True)
            # torch's attention sums in another order: a few units of float64.
            assert distance(reference.embed(text), expected) < 1e-12


def test_ours_and_transformers_agree_as_references(model_folder: Any) -> None:
    folder = model_folder("bert")
    ours, theirs = (Reference(folder, library=library) for library in ("bert_fast", "transformers"))
    for text in (*TEXTS, *EMPTY):
        assert ours.ids(text) == theirs.ids(text)
        assert distance(ours.embed(text), theirs.embed(text)) < 1e-12


class LeftPadded:
    """hidden() of a model whose positions count the padding."""

    def __init__(self, planted: Planted) -> None:
        self.model = planted.model

    @torch.inference_mode()
    def __call__(self, ids: list[list[int]], layout: str) -> list[Tensor]:
        length = max(map(len, ids))
        batch = torch.tensor([[0] * (length - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        states = self.model(batch, attention_mask=mask).last_hidden_state
        return [states[index, length - len(row) :] for index, row in enumerate(ids)]


def test_left_padding_that_shifts_positions_is_named(model_folder: Any) -> None:
    reference = Reference(model_folder("bert"))
    (row,) = check_hidden(LeftPadded(Planted(reference)), reference, layouts=["left padding"])
    assert row.finding is not None
    assert row.finding.mistake == "positions are counted from the padding"
    assert row.finding.text in TEXTS


def test_packing_with_positions_that_run_on_is_named(model_folder: Any) -> None:
    reference = Reference(model_folder("bert"))
    model = Planted(reference).model

    @torch.inference_mode()
    def hidden(ids: list[list[int]], layout: str) -> list[Tensor]:
        """Attention is right; the positions are those of one long text."""
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
        return [
            model(torch.tensor([row]), position_ids=start + torch.arange(len(row))[None]).last_hidden_state[0]
            for row, start in zip(ids, starts.tolist()[:-1], strict=True)
        ]

    texts = TEXTS[:2]
    (row,) = check_hidden(hidden, reference, layouts=["packing"], texts=texts)
    assert row.finding is not None
    assert row.finding.mistake == "positions run on over the texts of the batch"
    assert row.finding.text == texts[1]


def test_a_missing_normalization_is_named(model_folder: Any) -> None:
    folder = model_folder("bert", pooling="mean_tokens", max_seq_length=48, normalize=True)
    reference = Reference(folder)
    rows = list(check_encoder(Planted(reference), reference))
    assert {row.invariant for row in rows if not row.ok} == ALL
    assert all("the direction is right" in row.finding.mistake for row in rows if row.finding is not None)
    assert all(row.ok for row in check_encoder(Planted(reference), reference, unit=True))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            {"type": "sentence_transformers.models.CNN", "path": "2_CNN"},
            r"has the module sentence_.*CNN; expected",
        ),
        ({"type": 3}, "is no list of modules with a type"),
    ],
)
def test_modules_that_are_not_computed_are_named(tmp_path: Path, module: Any, message: str) -> None:
    import json

    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(ValueError, match=message):
        Reference(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Reference(tmp_path / "none")
