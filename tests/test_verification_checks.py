"""The further checks of `bert-fast verify`: each passes here, and catches the fault planted for it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bert_fast import verification_kernels as checks
from bert_fast import verification_models as models
from bert_fast.golden import inputs_of, tiny_model
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.mistakes import straight_through
from bert_fast.kernels._common.third_party import registered

Rows = Iterator[tuple[str, float, float]]


def failures(rows: Rows) -> list[str]:
    return [name for name, value, bound in rows if not value <= bound]


@pytest.mark.parametrize("op", ["add_layer_norm", "embedding_layer_norm", "bias_gelu", "linear", "masked_lm_loss"])
def test_gradients_agree_with_finite_differences(op: str) -> None:
    rows = list(checks.check_gradients(op))
    assert rows
    assert all(row.ok for row in rows), rows


def test_a_wrong_gradient_of_a_definition_is_found() -> None:
    """The value of the erf GeLU with the gradient of the tanh one."""
    sample = cases.load("bias_gelu").samples((5,))[0]

    def wrong(x: Tensor, bias: Tensor, impl: str) -> Tensor:
        return straight_through(functional.gelu(x + bias), functional.gelu(x + bias, approximate="tanh"))

    assert failures(checks.gradient_errors(replace(sample, call=wrong))) == ["dx", "dbias"]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("rate", ["rate"]),
        ("rows", ["rows"]),
        ("columns", ["columns"]),
        ("heads", ["heads"]),
        ("steps", ["steps"]),
        ("none", []),
    ],
)
def test_masks_that_repeat_are_found(fault: str, found: list[str]) -> None:
    """Of (rows, heads, columns): a neighbour that is a copy, another probability, the same mask in the next step."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.rand(96, 4, 64, generator=generator) >= (0.3 if fault == "rate" else 0.25) for _ in range(2))
    for mask in (first, second):
        if fault == "rows":
            mask[1::2] = mask[::2]
        if fault == "columns":
            mask[..., 1::2] = mask[..., ::2]
        if fault == "heads":
            mask[:, 1::2] = mask[:, ::2]
    assert failures(checks.mask_statistics(first, first if fault == "steps" else second, 0.25)) == found


@pytest.mark.parametrize("stable", [True, False])
def test_a_softmax_without_its_maximum_overflows(stable: bool) -> None:
    def attend(qkv: Tensor, cu_seqlens: Tensor, softmax_scale: float, **_: Any) -> Tensor:
        outs = []
        for part in qkv.split(cu_seqlens.diff().tolist()):
            query, key, value = part.permute(1, 2, 0, 3).unbind(0)
            scores = query @ key.transpose(1, 2) * softmax_scale
            probabilities = scores.softmax(-1) if stable else scores.exp() / scores.exp().sum(-1, keepdim=True)
            outs.append((probabilities @ value).transpose(0, 1))
        return torch.cat(outs)

    torch.manual_seed(0)
    with registered("attention", attend) as impl, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "LONGEST", 256)
        found = failures(checks.attention_extremes(impl, "cpu", torch.float32))
    assert [name.split(",")[0] for name in found] == ([] if stable else ["scores of +-1e4"])


def test_a_norm_without_eps_divides_by_zero() -> None:
    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
        s = x + residual
        return (s - s.mean(-1, keepdim=True)) / s.var(-1, keepdim=True, correction=0).sqrt() * weight + bias

    with registered("add_layer_norm", norm) as impl:
        found = failures(checks.constant_rows(impl, "cpu", torch.float32))
    assert found == ["constant rows", "constant rows, gradients"]


def test_memory_that_is_kept_is_a_leak() -> None:
    kept: list[mmap.mmap] = []

    def call(leak: bool, count: int) -> None:
        for _ in range(count):
            memory = mmap.mmap(-1, 400_000)  # new to the process, whatever earlier tests have left to the allocator
            memory.write(b"x" * len(memory))
            if leak:
                kept.append(memory)
            else:
                memory.close()

    for leak in (False, True):
        rows = checks.growth(partial(call, leak, 5), partial(call, leak, 48), "cpu")
        assert failures(rows) == ["bytes of the process"] * leak


def test_a_check_that_raises_is_a_failed_row() -> None:
    def raising() -> Rows:
        yield "one", 0.0, 1.0
        raise RuntimeError("no memory")

    first, second = checks.guarded("extremes", "an op", raising)
    assert first.ok
    assert (second.ok, second.error) == (False, "RuntimeError: no memory")


def test_heads_pass_and_a_wrong_kernel_under_them_does_not() -> None:
    """A LayerNorm that divides by E - 1, under the other kernels that `auto` takes."""
    torch.manual_seed(0)
    assert not failures(models.head_errors("BertForMaskedLM", "auto", "cpu"))
    wrong = cases.load("add_layer_norm").mistakes["the variance divides by E - 1 (biased variance expected: by E)"]
    with registered("add_layer_norm", wrong) as impl:
        found = failures(models.head_errors("BertForMaskedLM", {"add_layer_norm": impl}, "cpu"))
    assert "float32" in [name.split()[-1] for name in found]  # 1 % of a value, which bfloat16's own rounding hides


def test_masks_of_layers_and_steps() -> None:
    """The model's own pass; a layer that takes another's state, and a step that repeats the last, are named."""
    torch.manual_seed(0)
    model, inputs = tiny_model("BertForMaskedLM", dropout=models.DROPOUT).train(), inputs_of("BertForMaskedLM")
    assert not failures(models.model_dropout(model, inputs))
    right = models.dropout_states

    def shared(*arguments: Any) -> dict[str, Tensor]:
        states = right(*arguments)
        states["step 0, layer 1, place 2"] = states["step 0, layer 0, place 2"]
        return states

    def repeated(*arguments: Any) -> dict[str, Tensor]:
        states = right(*arguments)
        return {name: states[name.replace("step 1", "step 0")] for name in states}

    for fault in (shared, repeated):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "dropout_states", fault)
            found = failures(models.model_dropout(model, inputs))
        assert len(found) == 2, found  # the pair, and the sum over pairs
        assert found[1] == "chi-square"
