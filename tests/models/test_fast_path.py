"""The fast path: the bits of the modules that it bypasses, and nothing that a user changed is ignored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import bert_fast
from bert_fast import BertConfig, BertForPreTraining
from bert_fast.kernels import use_impl
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels.linear.reference import linear_reference
from bert_fast.models import layers
from bert_fast.models.fast_path import LayerOps

Pair = Callable[..., tuple[Any, Any]]
LENGTHS = (7, 1, 12)
LEAVES = [
    "embeddings.word_embeddings",
    "embeddings.LayerNorm",
    "encoder.layer.1.attention.self.qkv",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.1.attention.output.LayerNorm",
    "encoder.layer.1.intermediate.dense",
    "encoder.layer.1.output.dense",
]
CONTAINERS = [
    "embeddings",
    "encoder.layer.1",
    *(f"encoder.layer.1.{name}" for name in ("attention", "attention.self", "attention.output")),
    *(f"encoder.layer.1.{name}" for name in ("intermediate", "output")),
]


@pytest.fixture
def model(pair: Pair) -> Any:
    return pair("BertModel", torch.float32)[0]


def batch() -> dict[str, Tensor]:
    """Padded texts of LENGTHS."""
    ids = torch.arange(len(LENGTHS) * max(LENGTHS)).view(len(LENGTHS), -1) % 50 + 5
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def encode(model: Any) -> Tensor:
    hidden: Tensor = model(**batch()).last_hidden_state
    return hidden


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the public functions that the modules of layers called: none on the fast path."""
    names: list[str] = []
    monkeypatch.setattr(layers.BertPooler, "forward", lambda pooler, first: torch.tanh(pooler.dense(first)))
    for name in ("linear", "attention", "add_layer_norm"):
        monkeypatch.setattr(layers, name, partial(record_and_call, names, name, getattr(layers, name)))
    return names


def record_and_call(names: list[str], name: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    names.append(name)
    return function(*args, **kwargs)


def encode_by_modules(model: Any) -> Tensor:
    """The output with a hook without effect on a module of every layer, which disables the fast path."""
    hooks = [layer.attention.register_forward_hook(lambda *_: None) for layer in model.encoder.layer]
    out = encode(model)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_bits_of_the_modules(pair: Pair, calls: list[str], dtype: torch.dtype, mode: Any) -> None:
    model, _ = pair("BertModel", dtype, hidden_act="gelu_new")
    with mode():
        fast = encode(model)
        assert calls == []
        expected = encode_by_modules(model)
    assert calls.count("linear") == 8  # 4 in each of 2 layers
    assert torch.equal(fast, expected)


@torch.no_grad()
def test_the_chosen_implementation_runs(model: Any, calls: list[str]) -> None:
    with use_impl("reference"):
        ops = LayerOps.select(torch.zeros(1, 48))
        fast = encode(model)
        assert calls == []
        expected = encode_by_modules(model)
    assert ops is not None
    assert ops.linear is linear_reference
    assert torch.equal(fast, expected)


PRECISIONS = {  # dtype of the parameters, whether under autocast
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float64": (torch.float64, False),
    "autocast": (torch.float32, True),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("label_rows", [False, True], ids=["all rows", "label rows"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_training_has_the_bits_of_the_modules(
    pair: Pair, calls: list[str], precision: str, label_rows: bool, impl: str
) -> None:
    """Loss and every gradient, with dropout."""
    dtype, autocast = PRECISIONS[precision]
    model, _ = pair("BertForPreTraining", dtype, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    model.train()
    T = sum(LENGTHS)
    labels = torch.full((T,), -100)
    labels[[1, 4, 9]] = torch.tensor([7, 3, 11])
    inputs = {
        "input_ids": torch.arange(T) % 50 + 5,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        "max_seqlen": max(LENGTHS),
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 0]),
        "label_rows": torch.tensor([1, 4, 9]) if label_rows else None,
    }

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        with use_impl(impl), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]

    fast = gradients()
    assert calls == []
    layers_ = model.bert.encoder.layer
    hooks = [layer.attention.register_forward_hook(lambda *_: None) for layer in layers_]
    expected = gradients()
    for hook in hooks:
        hook.remove()
    assert calls.count("attention") == len(layers_)
    assert len(fast) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(fast, expected, strict=True))
    model.eval()
    assert not torch.equal(gradients()[0], fast[0])  # without dropout


def test_checkpointing_casts_and_other_activations_disable_it(model: Any, pair: Pair, calls: list[str]) -> None:
    model.encoder.gradient_checkpointing = True
    encode(model).sum().backward()
    assert calls.count("attention") == 4  # each layer once more in the backward pass
    assert model.encoder.layer[0].attention.self.qkv.weight.grad.any()
    hidden = torch.zeros(2, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LayerOps.select(hidden) is None
        assert LayerOps.select(hidden.bfloat16()) is not None
    calls.clear()
    with torch.no_grad():
        encode(pair("BertModel", torch.float32, hidden_act="relu")[0])
    assert calls.count("attention") == 2


def test_a_dropout_out_of_range_is_named(pair: Pair) -> None:
    model, _ = pair("BertModel", torch.float32, hidden_dropout_prob=0.1)
    model.train().encoder.layer[1].output.dropout_p = 1.0
    with pytest.raises(ValueError, match=r"dropout_p is 1\.0; expected 0 or a probability"):
        encode(model)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("path", [*LEAVES, *CONTAINERS])
def test_hooks_run_and_their_output_counts(model: Any, path: str, grad: bool) -> None:
    module = model.get_submodule(path)
    with torch.set_grad_enabled(grad):
        before = encode(model)
        inputs: list[Any] = []
        with module.register_forward_pre_hook(lambda _module, args: inputs.append(args)):
            torch.testing.assert_close(encode(model), before, rtol=1e-4, atol=1e-5)  # eager PyTorch rounds otherwise
        assert len(inputs) == 1
        with module.register_forward_hook(lambda _module, _args, out: 2 * out):
            assert not torch.allclose(encode(model), before, rtol=1e-3)
        assert torch.equal(encode(model), before)


@torch.no_grad()
def test_global_hooks_run(model: Any) -> None:
    names = []
    hook = register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        encode(model)
    finally:
        hook.remove()
    assert names.count("BertSelfAttention") == 2
    assert names.count("LayerNorm") == 5
    assert names.count("Linear") == 9  # the pooler's among them


class LoRA(nn.Module):
    """An adapter as PEFT's."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta = nn.Parameter(torch.randn_like(base_layer.weight) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.delta.t()  # type: ignore[no-any-return]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(parent: Any, leaf: nn.Linear) -> tuple[Tensor, Tensor]:
    parent.dense = LoRA(leaf)
    return leaf.weight + parent.dense.delta, leaf.bias


def subclass(parent: Any, leaf: nn.Linear) -> tuple[Tensor, Tensor]:
    parent.dense = Doubled(leaf.in_features, leaf.out_features)
    parent.dense.load_state_dict(leaf.state_dict())
    return 2 * leaf.weight, 2 * leaf.bias


def parametrize(parent: Any, leaf: nn.Linear) -> tuple[Tensor, Tensor]:
    parametrizations.weight_norm(parent.dense)
    parent.dense.parametrizations.weight.original0.mul_(1.5)
    return parent.dense.weight, leaf.bias


def zero_half(parent: Any, leaf: nn.Linear) -> tuple[Tensor, Tensor]:
    prune.l1_unstructured(parent.dense, "weight", amount=0.5)
    return parent.dense.weight_orig * parent.dense.weight_mask, leaf.bias


def replace_forward(parent: Any, leaf: nn.Linear) -> tuple[Tensor, Tensor]:
    leaf.forward = lambda x: 2 * nn.Linear.forward(leaf, x)  # type: ignore[method-assign]
    return 2 * leaf.weight, 2 * leaf.bias


@pytest.mark.parametrize("change", [adapt, subclass, parametrize, zero_half, replace_forward])
@pytest.mark.parametrize("block", ["attention.output", "intermediate", "output"])
@torch.no_grad()
def test_changed_leaves_are_called(model: Any, block: str, change: Any) -> None:
    before = encode(model)
    parent = model.encoder.layer[0].get_submodule(block)
    weight, bias = (x.detach().clone() for x in change(parent, parent.dense))
    changed = encode(model)
    assert not torch.allclose(changed, before, rtol=1e-2)
    parent.dense = nn.Linear(weight.shape[1], weight.shape[0])  # plain, with the weights that the change amounts to
    parent.dense.weight.copy_(weight), parent.dense.bias.copy_(bias)
    # float32 in another order through two layers: the error is 1.2e-6, 3 eps of values of up to 4.
    torch.testing.assert_close(changed, encode(model), rtol=1e-4, atol=1e-5)


def test_adapters_train_and_dropout_repeats_under_gradient_checkpointing() -> None:
    config = BertConfig.size("tiny", vocab_size=60)
    model = BertForPreTraining(config).train()
    layer = model.bert.encoder.layer[0]
    layer.attention.self.qkv = LoRA(layer.attention.self.qkv)  # type: ignore[assignment]
    layer.output.LayerNorm.register_forward_hook(lambda _module, _args, out: 1.5 * out)
    model.bert.embeddings.word_embeddings.register_forward_hook(lambda _module, _args, out: 3 * out)
    model.cls.predictions.decoder.register_forward_hook(lambda _module, _args, out: 2 * out)
    gradients = []
    for checkpointing in (False, True):
        model.bert.encoder.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**batch(), labels=batch()["input_ids"], next_sentence_label=torch.tensor([0, 1, 1])).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["bert.encoder.layer.0.attention.self.qkv.delta"].any()
    assert all(torch.equal(x, gradients[1][name]) for name, x in gradients[0].items())


@torch.no_grad()
def test_a_hooked_head_computes_its_loss(pair: Pair) -> None:
    model, _ = pair("BertForMaskedLM", torch.float32)
    inputs = {**batch(), "labels": batch()["input_ids"]}
    before = model(**inputs).loss
    with model.cls.predictions.transform.dense.register_forward_hook(lambda _module, _args, out: 2 * out):
        assert not torch.allclose(model(**inputs).loss, before)
    assert torch.equal(model(**inputs).loss, before)


@torch.no_grad()
def test_parameters_are_read_at_every_call(model: Any) -> None:
    layer = model.encoder.layer[0]
    before = encode(model)
    norm = layer.output.LayerNorm
    weight = norm.weight
    del norm.weight
    norm.weight = nn.Parameter(weight.clone())  # now the last of the module's parameters
    assert torch.equal(encode(model), before)
    layer.attention.output.dense.weight.mul_(1.5)
    changed = encode(model)
    assert not torch.allclose(changed, before)
    assert torch.equal(changed, encode_by_modules(model))
    layer.output.dense.bias = None
    assert torch.equal(encode(model), encode_by_modules(model))


@torch.no_grad()
def test_parameters_of_a_wrong_shape_are_named(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.weight = nn.Parameter(torch.ones(47))
    with pytest.raises(ValueError, match=r"weight has shape \(47,\); expected \(48,\)"):
        encode(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["by token", "calibrated"])
@torch.no_grad()
def test_int8(pair: Pair, calls: list[str], dtype: torch.dtype, calibrated: bool) -> None:
    model, _ = pair("BertModel", dtype)
    bert_fast.quantize(model, calibration=[batch()] if calibrated else None)
    calls.clear()
    fast = encode(model)
    assert calls == []
    expected = encode_by_modules(model)
    assert calls.count("attention") == 2
    assert torch.equal(fast, expected)


@torch.no_grad()
def test_a_float_model_needs_no_int8_implementation(model: Any, calls: list[str]) -> None:
    with use_impl("cpu"):
        implementation = OPS["linear_int8"].impls.pop("cpu")
        try:
            encode(model)
        finally:
            OPS["linear_int8"].impls["cpu"] = implementation
    assert calls == []


@torch.no_grad()
def test_layers_that_mix_float_and_int8_have_no_fast_path(model: Any, calls: list[str]) -> None:
    dense = model.encoder.layer[1].output.dense
    bert_fast.quantize(model)
    model.encoder.layer[1].output.dense = dense
    encode(model)
    assert calls.count("attention") == 1
    model.train()
    with pytest.raises(ValueError, match="can't be trained"):
        encode(model)
