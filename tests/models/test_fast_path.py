"""Inference straight from a layer's parameters: the bits of the doors, and nothing that a user did is ignored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import bert_fast
from bert_fast.kernels import use_impl
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels.linear.reference import linear_reference
from bert_fast.models import encoder

Pair = Callable[..., tuple[Any, Any]]
LENGTHS = (7, 1, 12)


@pytest.fixture
def model(pair: Pair) -> Any:
    return pair("BertModel", torch.float32)[0]


def batch() -> dict[str, Tensor]:
    """Padded texts of LENGTHS."""
    ids = torch.arange(len(LENGTHS) * max(LENGTHS)).view(len(LENGTHS), -1) % 50 + 5
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def encode(model: Any) -> Any:
    return model(**batch())


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the doors that layers went through, as they do."""
    passed: list[str] = []
    for name in ("linear", "attention", "add_layer_norm"):
        monkeypatch.setattr(encoder, name, partial(note_and_call, passed, name, getattr(encoder, name)))
    return passed


def note_and_call(passed: list[str], name: str, door: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    passed.append(name)
    return door(*args, **kwargs)


def by_doors(model: Any) -> Any:
    """The output with a hook that does nothing on a module of every layer, for which the doors are taken."""
    hooks = [layer.output.register_forward_hook(lambda *_: None) for layer in model.encoder.layer]
    out = encode(model)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_bits_of_the_doors(pair: Pair, doors: list[str], dtype: torch.dtype, mode: Any) -> None:
    model, _ = pair("BertModel", dtype, hidden_act="gelu_new")
    with mode():
        plain = encode(model)
        assert doors == []
        expected = by_doors(model)
    assert doors.count("linear") == 8  # 4 in each of 2 layers
    assert torch.equal(plain.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(plain.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_by_the_implementation_that_was_chosen(model: Any, doors: list[str]) -> None:
    with use_impl("reference"):
        calls = encoder.Calls.of(torch.zeros(1, 48))
        plain = encode(model)
        assert doors == []
        expected = by_doors(model)
    assert calls is not None
    assert calls.linear is linear_reference
    assert torch.equal(plain.last_hidden_state, expected.last_hidden_state)


def test_gradients_autocast_and_other_activations_take_the_doors(model: Any, pair: Pair, doors: list[str]) -> None:
    encode(model).last_hidden_state.sum().backward()
    assert doors.count("attention") == 2
    assert model.encoder.layer[0].attention.self.qkv.weight.grad.any()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert encode(model).last_hidden_state.dtype == torch.bfloat16
    assert doors.count("attention") == 4
    with torch.no_grad():
        encode(pair("BertModel", torch.float32, hidden_act="relu")[0])
    assert doors.count("attention") == 6


@pytest.mark.parametrize(
    "path",
    ["attention", "attention.self.qkv", "attention.output.LayerNorm", "intermediate", "intermediate.dense", "output"],
)
@torch.no_grad()
def test_hooks_are_called(model: Any, path: str) -> None:
    before = encode(model).last_hidden_state
    seen = []
    module = model.encoder.layer[1].get_submodule(path)
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    called = path in ("intermediate", "output")  # of the others a kernel takes the parameters
    assert torch.equal(encode(model).last_hidden_state, before)
    assert seen == (["pre"] if called else [])


@torch.no_grad()
def test_what_a_hook_returns_is_taken(model: Any) -> None:
    before = encode(model).last_hidden_state
    model.encoder.layer[0].output.register_forward_hook(lambda _module, _args, out: 2 * out)
    assert not torch.allclose(encode(model).last_hidden_state, before)


@torch.no_grad()
def test_hooks_on_every_module_are_called(model: Any) -> None:
    seen = []
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        encode(model)
    finally:
        hook.remove()
    assert seen.count("BertSelfAttention") == 2


class Doubled(encoder.BertIntermediate):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


@torch.no_grad()
def test_other_modules_are_called(model: Any) -> None:
    before = encode(model).last_hidden_state
    layer = model.encoder.layer[0]
    own = layer.intermediate
    layer.intermediate = Doubled(model.config)
    layer.intermediate.load_state_dict(own.state_dict())
    subclass = encode(model).last_hidden_state
    assert not torch.allclose(subclass, before)
    layer.intermediate = own
    assert torch.equal(encode(model).last_hidden_state, before)
    own.forward = lambda hidden: 2 * encoder.BertIntermediate.forward(own, hidden)
    assert torch.equal(encode(model).last_hidden_state, subclass)


@torch.no_grad()
def test_parameters_are_those_of_now(model: Any) -> None:
    layer = model.encoder.layer[0]
    before = encode(model).last_hidden_state
    norm = layer.output.LayerNorm
    gain = norm.weight
    del norm.weight
    norm.weight = nn.Parameter(gain.clone())  # last of the module's parameters now
    assert torch.equal(encode(model).last_hidden_state, before)
    layer.attention.output.dense.weight.mul_(1.5)
    changed = encode(model).last_hidden_state
    assert not torch.allclose(changed, before)
    assert torch.equal(changed, by_doors(model).last_hidden_state)
    layer.output.dense.bias = None
    assert torch.equal(encode(model).last_hidden_state, by_doors(model).last_hidden_state)


@torch.no_grad()
def test_parameters_that_do_not_fit_get_the_message_of_the_door(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.weight = nn.Parameter(torch.ones(47))
    with pytest.raises(ValueError, match=r"weight has shape \(47,\); expected \(48,\)"):
        encode(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["by token", "calibrated"])
@torch.no_grad()
def test_eight_bits(pair: Pair, doors: list[str], dtype: torch.dtype, calibrated: bool) -> None:
    model, _ = pair("BertModel", dtype)
    bert_fast.quantize(model, calibration=[batch()] if calibrated else None)
    doors.clear()
    plain = encode(model)
    assert doors == []
    expected = by_doors(model)
    assert doors.count("attention") == 2
    assert torch.equal(plain.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_an_implementation_that_has_no_eight_bits(model: Any, doors: list[str]) -> None:
    """What is asked of every op is asked of those alone that a layer needs."""
    with use_impl("cpu"):
        available = OPS["linear_int8"].impls.pop("cpu")
        try:
            encode(model)
        finally:
            OPS["linear_int8"].impls["cpu"] = available
    assert doors == []


@torch.no_grad()
def test_layers_of_both_kinds_take_the_doors(model: Any, doors: list[str]) -> None:
    dense = model.encoder.layer[1].output.dense
    bert_fast.quantize(model)
    model.encoder.layer[1].output.dense = dense
    encode(model)
    assert doors.count("attention") == 1
    model.train()
    with pytest.raises(ValueError, match="can't be trained"):
        encode(model)
