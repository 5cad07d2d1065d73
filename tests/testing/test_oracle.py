"""`assert_matches_oracle`: right kernels pass, wrong ones are caught, in their place and by their usual name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common import cases
from bert_fast.kernels._common.dispatch import IMPLS, OPS
from bert_fast.testing import CHECKS, OracleError, assert_matches_oracle, find_mismatches
from bert_fast.testing.checks import Target, run_check

FP32 = [torch.float32]
MISTAKES = [(op, mistake) for op in sorted(OPS) for mistake in cases.load(op).mistakes]
ON_CPU = [op for op in sorted(OPS) if "cpu" in OPS[op].impls and OPS[op].impls["cpu"].availability.ok]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("op", ON_CPU)
def test_our_own_kernels_pass(op: str, check: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert run_check(check, Target(op, "cpu", "cpu"), dtype) == []


@pytest.mark.parametrize(("op", "mistake"), MISTAKES)
def test_each_usual_mistake_is_caught_and_named(op: str, mistake: str) -> None:
    findings = find_mismatches(cases.load(op).mistakes[mistake], op, dtypes=FP32, checks=["accuracy", "dropout"])
    assert mistake in {finding.mistake for finding in findings if finding.check == "accuracy"}


# Kernels written otherwise than those of `mistakes.py`, with the mistake that they contain.


def padded_sdpa(
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    masks: bool,
    **_: Any,
) -> Tensor:
    """PyTorch's attention of the padded batch, without dropout."""
    qkv = qkv if bias is None else qkv + bias.to(qkv.dtype)
    lengths = cu_seqlens.diff().tolist()
    parts = [F.pad(part, (0, 0, 0, 0, 0, 0, 0, max_seqlen - len(part))) for part in qkv.split(lengths)]
    query, key, value = torch.stack(parts).permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.arange(max_seqlen) < cu_seqlens.diff()[:, None]
    mask = mask[:, None, None] | (not masks)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


def numpy_like_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float, **_: Any
) -> Tensor:
    """torch.std's default divides by n - 1, and eps is added to it."""
    x = residual + x + (0 if x_bias is None else x_bias)
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + eps) * weight + bias


def own_tanh_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    u = x + bias
    return 0.5 * u * (1 + torch.tanh(0.7978845608028654 * (u + 0.044715 * u**3)))


PLANTED: list[tuple[str, Any, str, str]] = [
    (
        "attention",
        functools.partial(padded_sdpa, masks=False),
        "softmax runs over padding: scores of 0 up to max_seqlen",
        "no dropout",
    ),
    ("add_layer_norm", numpy_like_norm, "eps is added outside the square root", "eps 0.5"),
    ("bias_gelu", own_tanh_gelu, "tanh GeLU in place of erf GeLU", "erf"),
]


@pytest.mark.parametrize(("op", "fn", "mistake", "case"), PLANTED)
def test_planted_kernels_are_caught_and_named(op: str, fn: Any, mistake: str, case: str) -> None:
    findings = find_mismatches(fn, op, dtypes=FP32, checks=["accuracy"])
    assert mistake in {finding.mistake for finding in findings if finding.case.startswith(case)}


def test_the_message_names_case_element_and_sequences() -> None:
    def mistaken_last_token(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        out = F.gelu(x + bias.to(x.dtype), approximate=approximate)
        return torch.cat([out[:-1], out[-1:] * 1.5])

    with pytest.raises(OracleError) as raised:
        assert_matches_oracle(mistaken_last_token, "bias_gelu", dtypes=FP32, checks=["accuracy"])
    message = str(raised.value)
    assert "accuracy, float32, case 'erf': out: error" in message
    assert "in 1 of 355 rows (rows 354)" in message
    assert raised.value.findings[0].mistake is None

    def half(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        return 0.5 * F.gelu(x + bias.to(x.dtype), approximate=approximate)

    (first, *_) = find_mismatches(half, "bias_gelu", dtypes=FP32, checks=["accuracy"])
    assert "it is 0.5 times what is expected" in first.text

    def one_sequence(qkv: Tensor, cu_seqlens: Tensor, **arguments: Any) -> Tensor:
        out = (
            OPS["attention"]
            .impls["reference"]
            .call(
                qkv,
                arguments["bias"],
                cu_seqlens,
                *(arguments[name] for name in ("max_seqlen", "softmax_scale", "dropout_p", "rng_state")),
            )
        )
        mask = torch.ones(len(out), 1, 1)
        mask[int(cu_seqlens[2]) : int(cu_seqlens[3])] = 1.1
        return out * mask.to(out.dtype)

    (first, *_) = find_mismatches(one_sequence, "attention", dtypes=FP32, checks=["accuracy"])
    assert "in the sequences of length 63, in 63 of 355 rows" in first.text


def overwrites(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x.detach().add_(bias.detach()) + 0 * bias) + 0 * x


def returns_float32(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Where x is bfloat16 and the bias float32, which autocast alone does here."""
    return F.gelu(x + bias, approximate=approximate)


def needs_a_row(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate) + 0 * x[0]


@pytest.mark.parametrize(
    ("check", "fn", "text"),
    [
        ("determinism", lambda x, bias, **_: F.gelu(x + bias) + 1e-7 * torch.rand_like(x), "has other bits"),
        ("inputs", overwrites, "writes to its input x"),
        ("layouts", lambda x, bias, **_: F.gelu(torch.as_strided(x, x.shape, (x.shape[1], 1)) + bias), "contiguous x"),
        ("nan", lambda x, bias, **_: F.gelu(x + bias) + 0 * x.sum(), "reaches 1"),
        ("nan", lambda x, bias, **_: F.gelu(x.nan_to_num() + bias), "does not reach out0"),
        ("accuracy", lambda x, bias, **_: torch.empty_like(x) + 0 * (x + bias), "elements are NaN"),
        ("edges", needs_a_row, "raised IndexError"),
        ("autocast", returns_float32, "returned torch.float32; expected torch.bfloat16"),
    ],
)
def test_each_check_finds_what_it_is_for(check: str, fn: Any, text: str) -> None:
    dtypes = [torch.float32, torch.bfloat16] if check == "autocast" else FP32
    findings = find_mismatches(fn, "bias_gelu", dtypes=dtypes, checks=[check])
    assert any(text in finding.text for finding in findings), [str(finding) for finding in findings]
    assert {finding.check for finding in findings} == {check}


def with_generator(
    input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, dropout_p: float, eps: float, padding_idx: int | None, rng_state: Tensor | None,
    *, probability: float | None = None, follows: bool = True, scale: bool = True,
) -> Tensor:  # fmt: skip
    """A mask from torch's generator, seeded by rng_state."""
    x = word[input_ids] + token_type[token_type_ids] + position[position_ids]
    x = F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    if rng_state is None:
        return x
    generator = torch.Generator().manual_seed(int(rng_state[0] * 31 + rng_state[1]) if follows else 0)
    p = dropout_p if probability is None else probability
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.dtype) * (1 / (1 - dropout_p) if scale else 1.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, None),
        ({"probability": 0.35}, "of the elements are dropped; expected 0.25"),
        ({"follows": False}, "another rng_state gives the same mask"),
        ({"scale": False}, "the mean of the output is 0.7"),
    ],
)
def test_a_mask_of_its_own(options: dict[str, Any], text: str | None) -> None:
    fn = functools.partial(with_generator, **options)
    checks = ["accuracy", "dropout"]
    findings = find_mismatches(fn, "embedding_layer_norm", dtypes=FP32, checks=checks, own_mask=True)
    if text is None:
        assert findings == []
        strict = find_mismatches(fn, "embedding_layer_norm", dtypes=FP32, checks=["dropout"])
        assert "of the dropout mask differ from the definition" in strict[0].text
    else:
        assert any(text in finding.text for finding in findings), findings


def test_wrong_arguments_and_nothing_left_registered() -> None:
    with pytest.raises(ValueError, match="checks has speed; expected some of accuracy, "):
        assert_matches_oracle(lambda **_: None, "bias_gelu", checks=["speed"])
    with pytest.raises(ValueError, match="op is 'gelu'"):
        assert_matches_oracle(lambda **_: None, "gelu")
    assert all(set(op.impls) <= set(IMPLS) for op in OPS.values())
