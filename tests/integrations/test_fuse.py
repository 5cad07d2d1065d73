"""A fused transformers model computes what the unfused one does, is saved and copied as before, and can be unfused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import bert_fast
from bert_fast.golden import HEADS
from bert_fast.integrations import bert as fused_bert

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
B, S = 3, 13
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 4e-14 of 1 + |value|.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make(name: str = "BertModel", dtype: torch.dtype = torch.float64, *arguments: Any, **settings: Any) -> Any:
    """A transformers model in eval mode, with weights so large that every tensor matters."""
    torch.manual_seed(0)
    labels = {"num_labels": 3} if name in ("BertForSequenceClassification", "BertForTokenClassification") else {}
    config = transformers.BertConfig(**{**SMALL, **labels, **settings})
    model = getattr(transformers, name)(config, *arguments)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * (0.15 if parameter.dim() > 1 else 0.3)
            parameter.copy_(noise + (1.0 if key.endswith("LayerNorm.weight") else 0.0))
    return model.to(dtype).eval()


def twins(name: str = "BertModel", dtype: torch.dtype = torch.float64, *arguments: Any, **settings: Any) -> Any:
    """A fused model and its unfused twin."""
    theirs = make(name, dtype, *arguments, **settings)
    return bert_fast.fuse(copy.deepcopy(theirs)), theirs


def mask_of(kind: str) -> Tensor | None:
    mask = torch.ones(B, S, dtype=torch.int64)
    if kind == "none":
        return None
    if kind == "left":
        mask[0, :4] = 0
        mask[2, :9] = 0
    elif kind != "full":
        mask[0, 9:] = 0
        mask[1, 4:6] = 0  # a hole
        mask[2, 1:] = 0
    return mask.bool() if kind == "bool" else mask


def inputs_of(name: str) -> dict[str, Tensor]:
    """A batch with labels, padded on the right and with a hole; no label at padding."""
    generator = torch.Generator().manual_seed(11)
    shape = (B, 2, S) if name == "BertForMultipleChoice" else (B, S)
    mask = mask_of("holes")
    assert mask is not None
    if name == "BertForMultipleChoice":
        mask = torch.stack([mask, mask.roll(1, dims=0)], dim=1)
    if name == "BertForQuestionAnswering":  # its softmax includes padding
        mask = torch.ones_like(mask)
    inputs = {
        "input_ids": torch.randint(0, 61, shape, generator=generator),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "attention_mask": mask,
    }
    words = torch.randint(0, 61, shape, generator=generator).masked_fill(mask == 0, -100)
    labels = {
        "BertForPreTraining": {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1])},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": torch.tensor([0, 1, 1])},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "BertForTokenClassification": {"labels": torch.where(words < 0, words, words % 3)},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([1, 3, 0]),
            "end_positions": torch.tensor([2, 7, 99]),
        },
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
    }
    return {**inputs, **labels.get(name, {})}


def results(model: Any, inputs: dict[str, Tensor], **flags: Any) -> dict[str, Tensor]:
    """Loss, outputs at the real tokens and the gradient of every parameter."""
    model.zero_grad()
    out = model(**inputs, **flags)
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    outputs = {}
    for key, value in out.items():
        for index, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            at_tokens = tensor.shape[:2] == mask.shape
            outputs[f"{key} {index}"] = tensor[mask] if at_tokens else tensor
    loss = out["loss"] if "loss" in out else sum(x.square().sum() for x in outputs.values())
    loss.backward()
    gradients = {f"d {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {**{key: value.detach() for key, value in outputs.items()}, **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **(tolerance or EXACT), msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", HEADS)
def test_loss_outputs_and_every_gradient(name: str) -> None:
    ours, theirs = twins(name)
    inputs = inputs_of(name)
    assert_same(results(ours, inputs, output_hidden_states=True), results(theirs, inputs, output_hidden_states=True))
    assert type(ours(**inputs)) is type(theirs(**inputs))


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("kind", ["none", "full", "holes", "bool", "left"])
def test_masks(kind: str, mode: str) -> None:
    ours, theirs = twins("BertModel", torch.float64, False)  # no pooler: padding may come first
    ids, mask = torch.randint(0, 61, (B, S)), mask_of(kind)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        actual = ours(ids, mask).last_hidden_state
        expected = theirs(ids, mask).last_hidden_state
    real = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(actual[real], expected[real], **EXACT)
    assert not actual[~real].any()


def test_inputs_embeds_token_types_and_positions() -> None:
    ours, theirs = twins()
    embeds = torch.randn(B, S, 48, dtype=torch.float64)
    mask = mask_of("holes")
    for extra in (
        {},
        {"position_ids": torch.arange(S).flip(0).unsqueeze(0)},
        {"token_type_ids": torch.ones(1, S).long()},
    ):
        leaves = [embeds.clone().requires_grad_() for _ in range(2)]
        outs = [m(inputs_embeds=x, attention_mask=mask, **extra) for m, x in zip((ours, theirs), leaves, strict=True)]
        for out in outs:
            (out.last_hidden_state[mask.bool()].square().sum() + out.pooler_output.sum()).backward()
        torch.testing.assert_close(outs[0].pooler_output, outs[1].pooler_output, **EXACT)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("states", [False, True], ids=["", "hidden states"])
def test_tuples(name: str, states: bool) -> None:
    ours, theirs = twins(name)
    inputs = {**inputs_of(name), "attention_mask": torch.ones(B, S).long()}
    actual, expected = (model(**inputs, return_dict=False, output_hidden_states=states) for model in (ours, theirs))
    assert type(actual) is tuple
    assert len(actual) == len(expected)
    flat = [[x for y in out for x in (y if isinstance(y, tuple) else (y,))] for out in (actual, expected)]
    for x, y in zip(*flat, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_tuple_of_a_model_without_a_pooler() -> None:
    ours, theirs = twins("BertModel", torch.float64, False)
    ids = torch.randint(0, 61, (B, S))
    actual, expected = ours(ids, return_dict=False), theirs(ids, return_dict=False)
    assert [x is None for x in actual] == [x is None for x in expected]


def test_defaults_from_the_configuration() -> None:
    ours, theirs = twins(output_hidden_states=True, return_dict=False)
    ids = torch.randint(0, 61, (B, S))
    assert [type(x) for x in ours(ids)] == [type(x) for x in theirs(ids)]


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "relu", "mish"])
def test_activations_with_and_without_a_kernel(act: str) -> None:
    ours, theirs = twins("BertForMaskedLM", hidden_act=act)
    inputs = inputs_of("BertForMaskedLM")
    # float64 (eps 2.2e-16): the difference is 2e-15.
    assert_same(results(ours, inputs), results(theirs, inputs), rtol=1e-9, atol=1e-9)


def enable_checkpointing(model: Any, arguments: dict[str, Any]) -> None:
    """The method's name depends on the version of transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    ours, theirs = twins("BertForMaskedLM")
    inputs = inputs_of("BertForMaskedLM")
    expected = results(theirs.train(), inputs)
    enable_checkpointing(ours.train(), {"use_reentrant": reentrant})
    calls = []
    for layer in ours.bert.encoder.layer:
        inner = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, inner=inner: calls.append(1) or inner(*a)
    assert_same(results(ours, inputs), expected)
    assert len(calls) == 2


def test_reentrant_checkpointing_of_a_model_with_frozen_embeddings() -> None:
    ours, theirs = twins("BertForMaskedLM", tie_word_embeddings=False)
    inputs = inputs_of("BertForMaskedLM")
    for model in (ours, theirs):
        model.train().bert.embeddings.requires_grad_(False)
        enable_checkpointing(model, {"use_reentrant": True})
        model.enable_input_require_grads()  # what PEFT calls
    assert_same(results(ours, inputs), results(theirs, inputs))
    assert ours.bert.encoder.layer[0].attention.self.query.weight.grad.any()


def test_gradient_checkpointing_repeats_the_dropout() -> None:
    ours, _ = twins("BertForMaskedLM", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    inputs = inputs_of("BertForMaskedLM")
    torch.manual_seed(3)
    expected = results(ours.train(), inputs)
    enable_checkpointing(ours, {"use_reentrant": False})
    torch.manual_seed(3)
    assert_same(results(ours, inputs), expected)


def test_dropout_has_the_same_distribution_and_follows_the_mode() -> None:
    ours, theirs = twins(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ids = torch.randint(0, 61, (200, 5))
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, **EXACT)
    ours.train(), theirs.train()
    with torch.no_grad():
        actual, expected = ours(ids.new_full((2000, 5), 7)), theirs(ids.new_full((2000, 5), 7))
    actual, expected = actual.last_hidden_state, expected.last_hidden_state
    # Mean and standard deviation over 2000 equal sequences: 5 standard errors; the relative error of the standard
    # deviation is about 1.6 %.
    spread = expected.std(dim=0)
    assert ((actual.mean(0) - expected.mean(0)).abs() < 5 * spread * (2 / 2000) ** 0.5).all()
    assert ((actual.std(0) / spread) - 1).abs().max() < 0.12
    ours.eval()
    ours.encoder.layer[1].output.dropout.train()  # a single module, as in Monte Carlo dropout
    assert not torch.equal(ours(ids).last_hidden_state, ours(ids).last_hidden_state)


def test_autocast_has_the_dtypes_of_transformers() -> None:
    ours, theirs = twins("BertModel", torch.float32)
    inputs = inputs_of("BertModel")
    real = inputs["attention_mask"].bool()
    truth = make("BertModel", torch.float64)(**inputs).last_hidden_state[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = (model(**inputs, output_hidden_states=True) for model in (ours, theirs))
    assert actual.pooler_output.dtype == expected.pooler_output.dtype
    assert [x.dtype for x in actual.hidden_states] == [x.dtype for x in expected.hidden_states]
    error, eager = ((x.last_hidden_state[real] - truth).abs().max() for x in (actual, expected))
    # The residual stream is rounded to bfloat16 too: 3 times eager's error, and four units of the largest value.
    assert error < 3 * eager + 4 * 2**-8 * truth.abs().max()
    actual.last_hidden_state.sum().backward()
    assert ours.encoder.layer[0].attention.self.query.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision(dtype: torch.dtype) -> None:
    ours, theirs = twins("BertForMaskedLM", dtype)
    inputs = inputs_of("BertForMaskedLM")
    truth = results(copy.deepcopy(theirs).double(), inputs)
    actual, eager = results(ours, inputs), results(theirs, inputs)
    for key, value in truth.items():
        errors = [(x[key].double() - value).abs().max() for x in (actual, eager)]
        assert errors[0] <= 3 * errors[1] + 4 * torch.finfo(dtype).eps * value.abs().max(), key


def test_parameters_names_and_optimizer_are_the_same_objects() -> None:
    model = make("BertForMaskedLM", torch.float32)
    names, parameters, keys = dict(model.named_modules()), dict(model.named_parameters()), list(model.state_dict())
    assert bert_fast.fuse(model) is model
    assert all(module is names[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model.bert, transformers.BertModel)
    assert type(model.bert).__name__ == "BertModel"
    inputs = inputs_of("BertForMaskedLM")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():  # the weights are read at every call, also after a change through `.data`
        before = model(**inputs).loss
        model.bert.encoder.layer[0].attention.self.query.weight.data.mul_(2.0)
        assert not torch.equal(model(**inputs).loss, before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _through_torch_save(model),
    "safetensors": lambda model: _through_safetensors(model),
}


def _through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_safetensors(model: nn.Module) -> Any:
    """A new fused model with the tensors of a file, where tied ones have one name."""
    loaded = make(type(model).__name__, initializer_range=0.5)
    with TemporaryDirectory() as folder:
        save_model(model, f"{folder}/tensors")
        load_model(bert_fast.fuse(loaded), f"{folder}/tensors")
    return loaded


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_fused_and_independent(how: str) -> None:
    ours, _ = twins("BertForMaskedLM")
    inputs = inputs_of("BertForMaskedLM")
    copied = COPIES[how](ours)
    assert type(copied.bert) is type(ours.bert)
    assert_same(results(copied, inputs), results(ours, inputs))
    with torch.no_grad():
        copied.bert.embeddings.LayerNorm.weight.zero_()
    assert ours.bert.embeddings.LayerNorm.weight.any()
    assert type(bert_fast.unfuse(copied).bert) is transformers.BertModel


def test_save_pretrained_writes_what_it_wrote_before(tmp_path: Path) -> None:
    ours, theirs = twins("BertForSequenceClassification", torch.float32)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    ours.bert.save_pretrained(tmp_path / "encoder")
    assert '"BertModel"' in (tmp_path / "encoder" / "config.json").read_text()
    again = bert_fast.fuse(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours")).eval()
    inputs = inputs_of("BertForSequenceClassification")
    torch.testing.assert_close(again(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForQuestionAnswering"])
def test_compiles_without_a_graph_break(name: str) -> None:
    ours, _ = twins(name, torch.float32, num_hidden_layers=1)
    inputs = inputs_of(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(results(ours, inputs), {k.replace("_orig_mod.", ""): v for k, v in results(compiled, inputs).items()})


class LoRA(nn.Module):
    """An adapter like PEFT's."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + x @ self.down.t() @ self.up.t()
        return out


@pytest.mark.parametrize("wrapped", ["qv", "dense", "norms", "embeddings"])
def test_wrapped_modules_are_called(wrapped: str) -> None:
    _, theirs = twins("BertForMaskedLM")

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5

    bert = theirs.bert
    for layer in bert.encoder.layer:
        if wrapped == "qv":
            layer.attention.self.query = LoRA(layer.attention.self.query)
            layer.attention.self.value = LoRA(layer.attention.self.value)
        elif wrapped == "dense":
            layer.attention.output.dense = LoRA(layer.attention.output.dense)
            layer.intermediate.dense = LoRA(layer.intermediate.dense)
        elif wrapped == "norms":
            layer.output.LayerNorm = Norm(48, eps=1e-12).double()
    if wrapped == "embeddings":  # also what enable_input_require_grads does
        bert.embeddings.word_embeddings.register_forward_hook(lambda _module, _args, out: out * 2)
    inputs = inputs_of("BertForMaskedLM")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = results(ours, inputs)
    assert_same(actual, results(theirs, inputs))


class Sentences(nn.Module):
    """A sentence encoder as users write it: the model in a ModuleList, the mean over the mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model])

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        hidden = self.parts[0](**features, return_dict=False)[0]
        mask = features["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        out: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return out


def test_inside_a_users_module() -> None:
    ours, theirs = bert_fast.fuse(Sentences(make())), Sentences(make())
    features = inputs_of("BertModel")
    torch.testing.assert_close(ours(features), theirs(features), **EXACT)
    assert fused_bert.is_fused(ours.parts[0])


def test_ddp(tmp_path: Path) -> None:
    ours, theirs = twins("BertForMaskedLM")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        actual = results(nn.parallel.DistributedDataParallel(ours), inputs_of("BertForMaskedLM"))
    finally:
        torch.distributed.destroy_process_group()
    actual = {key.replace("module.", ""): value for key, value in actual.items()}
    assert_same(actual, results(theirs, inputs_of("BertForMaskedLM")))


def test_unfuse_and_fusing_twice() -> None:
    model, untouched = make("BertForMaskedLM"), make("BertForMaskedLM")
    attributes = set(model.bert.__dict__)
    kind = type(bert_fast.fuse(model).bert)
    assert type(bert_fast.fuse(model).bert) is kind is not transformers.BertModel
    bert_fast.unfuse(model)
    assert type(model.bert) is transformers.BertModel
    assert set(model.bert.__dict__) == attributes
    inputs = inputs_of("BertForMaskedLM")
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)
    assert bert_fast.unfuse(model) is model


def test_only_a_subclass_that_does_not_override_forward_is_fused() -> None:
    class Named(transformers.BertModel):
        pass

    class Other(transformers.BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    config = transformers.BertConfig(**SMALL)
    named = bert_fast.fuse(Named(config))
    assert isinstance(named, Named)
    assert fused_bert.is_fused(copy.deepcopy(named))
    with pytest.warns(UserWarning, match="Other overrides forward"):
        other = bert_fast.fuse(Other(config))
    assert type(other) is Other


def test_a_module_without_a_supported_encoder_is_named() -> None:
    with pytest.raises(ValueError, match=r"MPNetModel contains no supported encoder, but .*'mpnet'.*RobertaModel"):
        bert_fast.fuse(transformers.MPNetModel(transformers.MPNetConfig(**SMALL)))
    with pytest.raises(ValueError, match="Sequential contains no supported encoder, but Sequential, Linear"):
        bert_fast.fuse(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="runs on its kernels already"):
        bert_fast.fuse(bert_fast.BertModel(bert_fast.BertConfig(**SMALL)))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        bert_fast.fuse("bert-base-uncased")  # type: ignore[type-var]
    model = make()
    model.config.position_embedding_type = "relative_key"
    with pytest.warns(UserWarning, match="does not change the BertModel, because config.position_embedding_type"):
        assert bert_fast.fuse(model) is model
    assert type(model) is transformers.BertModel


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_at_padding_a_head_reads_zeros(name: str) -> None:
    ours, theirs = twins(name)
    inputs = {**inputs_of("BertModel"), "attention_mask": mask_of("left")}
    real = inputs["attention_mask"].bool()
    head = ours.cls if name == "BertForMaskedLM" else ours.classifier
    logits_of_zeros = head(torch.zeros(1, 48, dtype=torch.float64))[0]
    actual, expected = ours(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(actual[real], expected[real], **EXACT)
    torch.testing.assert_close(actual[~real], logits_of_zeros.expand(int((~real).sum()), -1), **EXACT)


def test_wrong_arguments_raise_transformers_errors() -> None:
    ours, _ = twins()
    ids = torch.randint(0, 61, (B, S))
    with pytest.raises(TypeError, match="multiple values"):
        ours(ids, input_ids=ids)
    with pytest.raises(TypeError, match=r"BertModel\.forward"):
        ours(*[None] * 20)


def test_is_fused_says_what_fuse_did() -> None:
    model = make("BertForMaskedLM")
    wrapped = nn.Sequential(model)
    assert not bert_fast.is_fused(model)
    bert_fast.fuse(model)
    assert bert_fast.is_fused(model)
    assert bert_fast.is_fused(wrapped)
    assert bert_fast.is_fused(model.bert)
    assert not bert_fast.is_fused(model.cls)
    bert_fast.unfuse(wrapped)
    assert not bert_fast.is_fused(model)
    assert not bert_fast.is_fused(bert_fast.BertModel(bert_fast.BertConfig.size("tiny", vocab_size=50)))
    assert "is_fused" in dir(bert_fast)
    with pytest.raises(TypeError, match=r"model is str; expected a torch\.nn\.Module"):
        bert_fast.is_fused("model")  # type: ignore[arg-type]
