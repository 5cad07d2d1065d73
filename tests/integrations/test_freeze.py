"""`freeze`: the same results with packed weights, which follow every write that torch counts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bert_fast
from bert_fast.kernels._common import weight_cache
from bert_fast.models import BertConfig, BertForSequenceClassification, BertModel

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(5, 41).reshape(4, 9)


def own() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def with_head() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()


def fused() -> nn.Module:
    torch.manual_seed(0)
    return bert_fast.fuse(transformers.BertModel(transformers.BertConfig(**SIZES)).eval())


def quantized() -> nn.Module:
    return bert_fast.quantize(own())


def quantized_fused() -> nn.Module:
    return bert_fast.quantize(fused())


FLOAT = [own, with_head, fused]
MODELS: list[Any] = [*FLOAT, quantized, quantized_fused]


def run(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(IDS)[0]
    return out


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the values that were derived from weights, in order."""
    kinds: list[str] = []
    entry = weight_cache._Entry

    def recorded(*arguments: Any) -> Any:
        kinds.append("entry")
        return entry(*arguments)

    monkeypatch.setattr(weight_cache, "_Entry", recorded)
    return kinds


@pytest.mark.parametrize("make", MODELS)
def test_results_are_the_same(make: Callable[[], nn.Module], derived: list[str]) -> None:
    model = make()
    expected = run(model)
    assert bert_fast.freeze(model) is model
    before = len(derived)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    packed = len(derived)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    assert len(derived) == packed  # by the first call alone
    assert packed > before or bert_fast.kernels._common.extensions.cpu_isa() == "generic"
    assert bert_fast.unfreeze(model) is model
    assert not any(weight_cache.are_frozen((x,)) for x in model.parameters())
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.5)


def one_value(model: nn.Module) -> None:
    with torch.no_grad():
        for x in model.parameters():
            x.view(-1)[-1] = 2.0


def load(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.load_state_dict({name: torch.randn_like(x) * 0.1 for name, x in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.load_state_dict({name: torch.randn_like(x) * 0.1 for name, x in model.state_dict().items()}, assign=True)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(IDS)[0].square().sum().backward()
    optimizer.step()
    model.eval()


def new_data(model: nn.Module) -> None:
    for x in model.parameters():
        x.data = x.data * 0.5


def bfloat16_and_back(model: nn.Module) -> None:
    run(model.bfloat16())
    model.float()


def uncounted_and_again(model: nn.Module) -> None:
    for x in model.parameters():
        x.data.clamp_(-0.01, 0.01)
    bert_fast.freeze(model)


WRITES = [in_place, one_value, load, assign, train, new_data, bfloat16_and_back, uncounted_and_again]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", FLOAT)
def test_writes_that_torch_counts_are_seen(make: Callable[[], nn.Module], write: Callable[[nn.Module], None]) -> None:
    model = bert_fast.freeze(make())
    before = run(model)
    write(model)
    after = run(model)
    assert not torch.equal(after, before)
    other = make()  # which is not frozen
    other.load_state_dict(model.state_dict())
    # The pooler and the classifier are torch's products, whose bits depend on where the memory lies.
    torch.testing.assert_close(after, run(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_copies_are_not_frozen(make: Callable[[], nn.Module]) -> None:
    model = bert_fast.freeze(make())
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(twin), expected, rtol=1e-5, atol=1e-6)
        for x in [*twin.parameters(), *twin.buffers()]:
            if x.is_floating_point():
                x.data.clamp_(-0.01, 0.01)  # not counted
        assert not torch.equal(run(twin), expected)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)


def test_nothing_else_of_the_model_changes() -> None:
    model, other = with_head(), bert_fast.freeze(with_head())
    assert {name: x.requires_grad for name, x in model.named_parameters()} == {
        name: x.requires_grad for name, x in other.named_parameters()
    }
    run(other)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    for module in (model, other):
        module.train()(IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    gradients = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients if a.grad is not None and b.grad is not None)


def test_packed_weights_go_with_the_model() -> None:
    model = bert_fast.freeze(own())
    run(model)
    keys = {id(x) for x in model.parameters()}
    del model
    assert not keys & weight_cache._frozen.keys()


def test_refused() -> None:
    with pytest.raises(TypeError, match=r"model is str; expected a torch\.nn\.Module"):
        bert_fast.freeze("model")  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"contains no supported encoder, but Linear; expected a bert_fast model"):
        bert_fast.freeze(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="expected a bert_fast model, or a module that contains"):
        bert_fast.unfreeze(transformers.BertModel(transformers.BertConfig(**SIZES)))
    with torch.inference_mode():
        model = own()
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.\S+ was made under torch.inference_mode\(\)"):
        bert_fast.freeze(model)
    assert not any(weight_cache.are_frozen((x,)) for x in model.parameters())


@pytest.mark.parametrize("make", FLOAT)
def test_without_it_every_write_is_seen(make: Callable[[], nn.Module]) -> None:
    """Also those that torch doesn't count, of single values, own models and fused ones."""
    model, other = make(), make()
    run(model)
    for name, x in model.named_parameters():
        if x.dim() == 2 and "embeddings" not in name:
            before = run(model)
            x.data[x.shape[0] // 2].add_(torch.randn(x.shape[1]))
            run_before = run(model)
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(run_before, run(other), rtol=1e-5, atol=1e-6)
            if "pooler" not in name and "classifier" not in name:
                assert not torch.equal(run_before, before), name
