"""`attn_implementation="bert_fast"`: transformers' models compute what they compute with their own attention."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import bert_fast
from bert_fast.integrations import attention_interface as registered

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80}
ENCODER = {**SIZES, "num_attention_heads": 3, "max_position_embeddings": 64, "initializer_range": 0.15}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": ENCODER,
    "Roberta": {**ENCODER, "pad_token_id": 1},
    "XLMRoberta": {**ENCODER, "pad_token_id": 1},
    "Electra": {**ENCODER, "embedding_size": 32},
    "Esm": {**ENCODER, "pad_token_id": 1, "position_embedding_type": "rotary", "mask_token_id": 4},
    "ModernBert": {**ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    "Albert": {**ENCODER, "embedding_size": 24},
    "Ernie": ENCODER,
    "EuroBert": {**ENCODER, "pad_token_id": 0, "num_key_value_heads": 1},
}
B, S = 3, 23
LENGTHS = (23, 5, 11)
# float64: two layers, with sums of up to 80 terms, differ by at most 4e-14 of 1 + |value|.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
pytestmark = pytest.mark.transformers_5  # the attention interface
NAMES = [name for name in MODELS if hasattr(transformers, f"{name}Model")]
COMPLETE = [name for name in NAMES if name != "ModernBert"]  # whose every layer runs on the kernel


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_warned", set())
    bert_fast.register()


def twins(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model with our attention, and its twin with transformers' sdpa (some eager ones round to float32)."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **settings})
    theirs = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="sdpa").double().eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("bert_fast")
    return ours, theirs


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 61, (B, S), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_forward_and_backward(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = twins(name)
    calls: list[int] = []
    attention = registered.attention
    monkeypatch.setattr(registered, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    ids, mask = batch()
    inputs = {"input_ids": ids, **({"attention_mask": mask} if padded else {})}
    with warnings.catch_warnings():
        if name in COMPLETE:
            warnings.simplefilter("error", UserWarning)
        else:
            warnings.simplefilter("ignore", UserWarning)
        out = ours(**inputs).last_hidden_state
    expected = theirs(**inputs).last_hidden_state
    assert len(calls) == (1 if name == "ModernBert" else 2)
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(out[real], expected[real], **EXACT)
    weights = torch.randn(out[real].shape, dtype=torch.float64)
    (out[real] * weights).sum().backward()
    (expected[real] * weights).sum().backward()
    for (key, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("name", "boundaries"),
    [
        *((name, True) for name in ("Bert", "Roberta", "Esm", "ModernBert", "EuroBert")),
        *((name, False) for name in ("Bert", "Roberta", "EuroBert")),  # that pass position_ids to their attention
    ],
)
def test_flattened(name: str, boundaries: bool) -> None:
    ours, theirs = twins(name)
    first = 2 if name == "Roberta" else 0
    ids, _ = batch()
    rows = [row[:n] for row, n in zip(ids, LENGTHS, strict=True)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
    inputs = dict(collator([{"input_ids": row.tolist()} for row in rows]))
    inputs.pop("labels")
    inputs["position_ids"] = inputs["position_ids"] + first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "ModernBert" else "error", UserWarning)
        out = ours(**inputs).last_hidden_state[0]
    expected = torch.cat([theirs(input_ids=row[None]).last_hidden_state[0] for row in rows])
    torch.testing.assert_close(out, expected, **EXACT)


def test_dropout() -> None:
    """Of the attention probabilities alone: the mean over many draws is the output without, and each draw differs."""
    ours, _ = twins("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.25, num_hidden_layers=1)
    ids, mask = batch()
    layer = ours.encoder.layer[0].attention.self
    hidden = ours.embeddings(ids)
    layer.requires_grad_(False)
    hidden = hidden.detach()
    exact = layer(hidden, attention_mask=mask)[0]
    layer.train()
    draws = torch.stack([layer(hidden, attention_mask=mask)[0] for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / 400**0.5
    # 3312 values: the largest of as many normal deviates is beyond 6 in one of 150,000 runs.
    assert float(((draws.mean(0) - exact).abs() / (error + 1e-12))[mask.bool()].max()) < 6.0
    torch.manual_seed(5)
    first = layer(hidden, attention_mask=mask)[0]
    torch.manual_seed(5)
    assert torch.equal(layer(hidden, attention_mask=mask)[0], first)


def test_in_bfloat16_and_float32() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        ours, theirs = twins("Bert")
        ids, mask = batch()
        expected = theirs(ids, attention_mask=mask).last_hidden_state.detach()
        with torch.no_grad():
            out = ours.to(dtype)(ids, attention_mask=mask).last_hidden_state
        # Values of up to 4: 10 eps in float32; in bfloat16 (eps 0.0078) five eps after two layers.
        assert float((out.double() - expected)[mask.bool()].abs().max()) < tolerance


def test_what_the_kernels_lack_is_named_and_right() -> None:
    ours, theirs = twins("Bert")
    ids, mask = batch()
    square = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(2)) > 0.3
    square |= torch.eye(S).bool()
    with pytest.warns(UserWarning, match="runs transformers' sdpa, because the attention mask has 4 dimensions"):
        out = ours(ids, attention_mask=square).last_hidden_state
    additive = torch.zeros(B, 1, S, S, dtype=torch.float64).masked_fill(~square, torch.finfo(torch.float64).min)
    torch.testing.assert_close(out, theirs(ids, attention_mask=additive).last_hidden_state, **EXACT)
    ours, theirs = twins("ModernBert")
    with pytest.warns(UserWarning, match="because sliding_window was passed"):
        ours(ids, attention_mask=mask)


def test_a_causal_model_stays_causal() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
    theirs = transformers.GPT2Model._from_config(transformers.GPT2Config(**sizes), attn_implementation="eager")
    theirs = theirs.double().eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("bert_fast")
    ids, mask = batch()
    for inputs in ({}, {"attention_mask": mask}):
        registered._warned.clear()
        with pytest.warns(UserWarning, match="because the attention"):
            out = ours(ids, **inputs).last_hidden_state
        expected = theirs(ids, **inputs).last_hidden_state
        torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], **EXACT)


def test_an_encoder_and_a_decoder() -> None:
    """Of equal lengths: the mask of the keys is not one of the queries."""
    sizes = {"vocab_size": 61, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
    torch.manual_seed(0)
    config = transformers.BartConfig(**sizes, **heads)
    theirs = transformers.BartModel._from_config(config, attn_implementation="eager").double().eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("bert_fast")
    ids, mask = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, **EXACT)


def test_fuse_takes_a_model_with_this_attention() -> None:
    ours, theirs = twins("Bert")
    bert_fast.fuse(ours)
    ids, mask = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = ours(ids, attention_mask=mask).last_hidden_state
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], **EXACT)


def test_without_transformers_the_error_says_so() -> None:
    code = "import sys; sys.modules['transformers'] = None; import bert_fast; bert_fast.register()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "bert_fast.register needs transformers 5 or newer" in done.stderr
