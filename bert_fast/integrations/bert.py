"""The forward of a fused model: transformers' modules on packed tokens. Imported only where transformers is.

Also of ...ForQuestionAnswering, whose softmax runs over the tokens, padding among them.

The weights are those of transformers' modules, read at every call. A kernel computes a plain module
(`bert_fast.models.plain`); any other (LoRA, a quantized layer) is called on the packed tokens: all work token by token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    QuestionAnsweringModelOutput,
)

from bert_fast.integrations.flattened import Flattened, flattened_of
from bert_fast.integrations.layouts import LayerParts, Layout, SublayerEnd, layout_of, layouts
from bert_fast.integrations.reasons import first_position, is_supported_dropout, why_not_supported
from bert_fast.kernels import attention, linear
from bert_fast.kernels._common.checks import autocast_dtype, compute_dtype
from bert_fast.kernels._common.philox import new_rng_state
from bert_fast.models.activations import GELU_ACTIVATIONS
from bert_fast.models.encoder import DROPOUTS_PER_LAYER
from bert_fast.models.inputs import Tokens
from bert_fast.models.int8 import Int8Linear
from bert_fast.models.layers import add_norm, embed, linear_bias, linear_defer_bias
from bert_fast.models.plain import is_plain, is_plain_embedding, is_plain_norm
from bert_fast.threads import settle_after_fork

# The class of the activation -> the `activation` argument of linear.
_GELU_CLASSES = {type(ACT2FN[name]): gelu for name, gelu in GELU_ACTIVATIONS.items() if name in ACT2FN}
_QA_ARGUMENTS = ("start_positions", "end_positions", "return_dict")  # that the encoder does not get
_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}
_warned: set[str] = set()


class FusedBert:
    """Marks a generated class and makes its objects picklable: unpickling generates the class again."""

    original_class: type[nn.Module]
    layout: Layout

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_new, (type(self).original_class,), *reduced[2:])


def _new(original_class: type[nn.Module]) -> nn.Module:
    generated = fused_class(original_class)
    return generated.__new__(generated)


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` changed this module's class."""
    return isinstance(module, FusedBert)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a fused module had before."""
    assert isinstance(module, FusedBert)
    return module.original_class


def reads_padding(module: Any) -> bool:
    """Whether this is a head over a fused encoder whose loss reads the encoder's output at padding."""
    layout = next((layout for layout in layouts() if isinstance(module, layout.question_answering)), None)
    if layout is None or type(module).forward is not layout.question_answering.forward or "forward" in module.__dict__:
        return False
    return is_fused(getattr(module, layout.base))


def fused_class(original_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an encoder or question answering class whose forward runs on the kernels.

    It has the name of `original_class`: transformers writes a model's class name into config.json and looks it up.
    """
    if original_class not in _fused_classes:
        _fused_classes[original_class] = _generate_class(original_class)
    return _fused_classes[original_class]


def _generate_class(original_class: type[nn.Module]) -> type[nn.Module]:
    original: Callable[..., Any] = original_class.forward
    parameters = inspect.signature(original).parameters
    positional = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
    named_return_dict = "return_dict" in positional  # transformers 4.57
    layout = layout_of(original_class)
    assert layout is not None
    run = _answer if issubclass(original_class, layout.question_answering) else _encode

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(positional) or any(name in kwargs for name in positional[: len(args)]):
            return original(self, *args, **kwargs)  # which raises the error
        arguments = {**dict(zip(positional, args, strict=False)), **kwargs}
        if not torch.compiler.is_compiling():
            settle_after_fork()
        return run(self, original, arguments, named_return_dict=named_return_dict)

    attributes = {"forward": forward, "original_class": original_class, "layout": layout}
    names = {name: getattr(original_class, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(original_class.__name__, (FusedBert, original_class), {**attributes, **names})


@torch.compiler.assume_constant_result
def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"bert_fast.fuse: this call runs transformers' own forward, because {reason}", UserWarning, stacklevel=6
        )


def _encode(model: Any, original: Callable[..., Any], arguments: dict[str, Any], *, named_return_dict: bool) -> Any:
    reason = why_not_supported(model, model.layout, arguments)
    if reason is None:
        return _forward(model, arguments, named_return_dict=named_return_dict)
    _warn_once(reason)
    return original(model, **arguments)


def _answer(model: Any, original: Callable[..., Any], arguments: dict[str, Any], *, named_return_dict: bool) -> Any:
    """...ForQuestionAnswering with padding left out of the softmax over the tokens, as the encoder leaves it out."""
    mask, encoder = arguments.get("attention_mask"), getattr(model, model.layout.base)
    inputs = {name: x for name, x in arguments.items() if name not in _QA_ARGUMENTS}
    if mask is None or not is_fused(encoder) or why_not_supported(encoder, encoder.layout, inputs) is not None:
        return original(model, **arguments)
    output = original(model, **inputs, return_dict=True)
    padding = mask == 0
    losses = []
    for end in ("start", "end"):
        logits = output[f"{end}_logits"]
        logits = output[f"{end}_logits"] = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        positions = arguments.get(f"{end}_positions")
        if positions is not None:
            # As in transformers, a position past the end is ignored; so is one at padding.
            positions = positions.reshape(-1).clamp(0, logits.shape[1])
            outside = F.pad(padding, (0, 1), value=True).gather(1, positions[:, None])[:, 0]
            losses.append(F.cross_entropy(logits, positions.masked_fill(outside, -100)))
    loss = (losses[0] + losses[1]) / 2 if len(losses) == 2 else None
    output = QuestionAnsweringModelOutput(**{**output, "loss": loss})
    return output if _returns_dict(model.config, arguments, named=named_return_dict) else output.to_tuple()


class _Sizes(NamedTuple):
    vocab_size: int
    input_size: int
    type_vocab_size: int
    max_position_embeddings: int
    first_position: int = 0


def _forward(model: Any, arguments: dict[str, Any], *, named_return_dict: bool) -> Any:
    """What transformers' forward returns, for a call that `why_not_supported` has no reason against."""
    config, layout = model.config, model.layout
    with_states = arguments.get("output_hidden_states")
    with_states = config.output_hidden_states if with_states is None else with_states
    hidden, tokens, rng_states = _embed(model, arguments)
    hidden_states = [hidden]
    for index, layer in enumerate(layout.layers(model)):
        states = None if rng_states is None else rng_states[1 + DROPOUTS_PER_LAYER * index :][:DROPOUTS_PER_LAYER]
        run = partial(_layer, layout.parts_of(layer), tokens.cu_seqlens, tokens.max_seqlen, states)
        if layer.gradient_checkpointing and layer.training:
            # The second run drops what the first dropped: that depends on `states` only.
            hidden = layer._gradient_checkpointing_func(run, hidden)
        else:
            hidden = run(hidden)
        hidden_states.append(hidden)

    # transformers' residual stream, and so its outputs, keep the parameters' dtype under autocast.
    norm_weight = getattr(model.embeddings.LayerNorm, "weight", hidden)
    dtype = norm_weight.dtype if autocast_dtype(hidden) else hidden.dtype
    restored = [tokens.restore(x.to(dtype)) for x in (hidden_states if with_states else hidden_states[-1:])]
    fields: dict[str, Any] = {
        "last_hidden_state": restored[-1],
        "hidden_states": tuple(restored) if with_states else None,
    }
    returns_dict = _returns_dict(config, arguments, named=named_return_dict)
    output: Any
    if layout.pooler is None:
        output_class = BaseModelOutput if layout.base == "distilbert" else BaseModelOutputWithPastAndCrossAttentions
        output = output_class(**fields)
        return output if returns_dict else output.to_tuple()
    pooled = None
    is_flattened = tokens.shape is not None and tokens.batch_size != tokens.shape[0]
    if model.pooler is not None and (is_flattened or is_plain(model.pooler, layout.pooler)):
        pooled = model.pooler(tokens.first(hidden.to(dtype)).unsqueeze(1))
    elif model.pooler is not None:
        pooled = model.pooler(restored[-1])
    output = BaseModelOutputWithPoolingAndCrossAttentions(**fields, pooler_output=pooled)
    if returns_dict:
        return output
    if named_return_dict:  # transformers 4.57 has pooler_output in the tuple even where it is None
        return (restored[-1], pooled, *output.to_tuple()[1:][pooled is not None :])
    return output.to_tuple()


def _returns_dict(config: Any, arguments: dict[str, Any], *, named: bool) -> bool:
    if named and arguments.get("return_dict") is None:
        return bool(config.use_return_dict)
    return arguments.get("return_dict", getattr(config, "return_dict", True)) is not False


def _embed(model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tokens, Tensor | None]:
    """The embeddings of the real tokens (T, E), the tokens, and the dropout states int64 (1 + 3L, 2)."""
    embeddings = model.embeddings
    token_type = getattr(embeddings, "token_type_embeddings", None)  # DistilBERT has none
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    types, positions = (_with_batch(arguments.get(name)) for name in ("token_type_ids", "position_ids"))
    B, S = (ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
    shape = (B, S)
    flattened = flattened_of(model.config, arguments, shape, first_position(embeddings))
    if flattened is not None:
        positions = flattened.position_ids
        # transformers 4.57 has default types for max_position_embeddings tokens only.
        types = torch.zeros_like(positions) if types is None else types
    if _plain_embeddings(embeddings, token_type, embeds, model.layout):
        word, position = embeddings.word_embeddings, embeddings.position_embeddings
        sizes = _Sizes(
            word.num_embeddings,
            word.embedding_dim,
            0 if token_type is None else token_type.num_embeddings,
            position.num_embeddings,
            first_position(embeddings),
        )
        inputs = {"input_ids": ids, "inputs_embeds": embeds, "token_type_ids": types, "position_ids": positions}
        tokens = _tokens(sizes, mask, flattened, shape, **inputs)
        rng_states = _rng_states(model, tokens.cu_seqlens.device)
        hidden = embed(
            tokens,
            word,
            token_type,
            position,
            embeddings.LayerNorm,
            dropout_p=_dropout_p(embeddings.dropout),
            rng_state=None if rng_states is None else rng_states[0],
        )
    else:
        # A wrapper or a hook expects (B, S): run it, and select the real tokens from its output.
        if token_type is None:  # whose arguments have other names in transformers 4.57
            out = embeddings(ids, embeds, *([] if positions is None else [positions]))
        else:
            out = embeddings(input_ids=ids, token_type_ids=types, position_ids=positions, inputs_embeds=embeds)
        sizes = _Sizes(0, out.shape[2], 1, out.shape[1])
        tokens = _tokens(sizes, mask, flattened, shape, inputs_embeds=out)
        assert tokens.inputs_embeds is not None
        hidden, rng_states = tokens.inputs_embeds, _rng_states(model, out.device)
    if hasattr(model, "embeddings_project"):  # ELECTRA
        hidden = linear_bias(hidden, model.embeddings_project)
    return hidden, tokens, rng_states


def _tokens(
    sizes: _Sizes, mask: Tensor | None, flattened: Flattened | None, shape: tuple[int, int], **inputs: Tensor | None
) -> Tokens:
    if flattened is None:
        return Tokens.from_inputs(sizes, attention_mask=mask, **inputs)  # type: ignore[arg-type]
    rows = {name: None if x is None else x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}
    boundaries: Any = {"cu_seqlens": flattened.cu_seqlens, "max_seqlen": flattened.max_seqlen}
    return replace(Tokens.from_inputs(sizes, **rows, **boundaries), shape=shape)  # type: ignore[arg-type]


def _with_batch(ids: Tensor | None) -> Tensor | None:
    return ids.unsqueeze(0) if isinstance(ids, Tensor) and ids.dim() == 1 else ids


def _plain_embeddings(embeddings: Any, token_type: Any, embeds: Tensor | None, layout: Layout) -> bool:
    """Whether `embed` computes transformers' embeddings module."""
    word, position = embeddings.word_embeddings, embeddings.position_embeddings
    tables = [table for table in (word, position, token_type) if table is not None]
    if not (is_plain(embeddings, layout.embeddings) and is_plain_norm(embeddings.LayerNorm)):
        return False
    if not (is_supported_dropout(embeddings.dropout) and all(map(is_plain_embedding, tables))):
        return False
    dtype = word.weight.dtype
    return (
        (token_type is None or token_type.padding_idx is None)
        and all(table.weight.dtype == dtype for table in tables)
        and (embeds is None or embeds.dtype == dtype)
    )


def _dropout_p(dropout: nn.Module) -> float:
    """The probability with which `dropout` drops in its current mode."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _attention_dropout_p(module: Any) -> float:
    # Where transformers passes the probability to an attention function, the attention's own mode decides; where it
    # calls the dropout module (4.57, eager), that module's.
    as_argument = hasattr(module, "scaling") or hasattr(module, "dropout_prob")
    p: float = getattr(module, "dropout_prob", module.dropout.p if isinstance(module.dropout, nn.Dropout) else 0.0)
    return p if (module.training if as_argument else module.dropout.training) else 0.0


def _rng_states(model: Any, device: torch.device) -> Tensor | None:
    """Draw the state of every place of dropout; None, with nothing drawn, where nothing is dropped."""
    layers = [model.layout.parts_of(layer) for layer in model.layout.layers(model)]
    drops = _dropout_p(model.embeddings.dropout) > 0.0 or any(
        _attention_dropout_p(parts.attention) > 0.0
        or _dropout_p(parts.attention_output.dropout) > 0.0
        or _dropout_p(parts.output.dropout) > 0.0
        for parts in layers
    )
    return new_rng_state(device, 1 + DROPOUTS_PER_LAYER * len(layers)) if drops else None


def _layer(parts: LayerParts, cu_seqlens: Tensor, max_seqlen: int, rng_states: Tensor | None, hidden: Tensor) -> Tensor:
    """(T, E) -> (T, E)."""
    states = (None, None, None) if rng_states is None else rng_states.unbind(0)
    qkv, bias = _qkv(parts, hidden)
    p = _attention_dropout_p(parts.attention)
    out = attention(
        qkv,
        cu_seqlens,
        max_seqlen,
        bias=bias,
        softmax_scale=getattr(parts.attention, "scaling", None),
        dropout_p=p,
        rng_state=states[0] if p else None,
    )
    hidden = _sublayer_end(parts.attention_output, out.flatten(1).to(compute_dtype(hidden)), hidden, states[1])
    gelu = _GELU_CLASSES.get(type(parts.activation))
    up, down = parts.intermediate, parts.output.dense
    if gelu is not None and is_plain(up, Int8Linear) and is_plain(down, Int8Linear):
        x = up.feed_forward(hidden, down, gelu)
        return _sublayer_end(parts.output, x, hidden, states[2], without_bias=True)
    return _sublayer_end(parts.output, _intermediate(parts, hidden), hidden, states[2])


def _qkv(parts: LayerParts, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values (T, 3, N, D), and the bias (3, N, D) that is still to be added."""
    linears, heads = parts.qkv, parts.heads
    concatenated = getattr(linears[0], "concatenated", None)
    if concatenated is not None and all(is_plain(dense, Int8Linear) for dense in linears):
        qkv, bias = linear_defer_bias(hidden, concatenated, to_attention=True)
        return qkv.unflatten(1, (3, *heads)), None if bias is None else bias.view(3, *heads)
    if not all(is_plain(dense, nn.Linear) and dense.bias is not None for dense in linears):
        return torch.stack([dense(hidden) for dense in linears], dim=1).unflatten(2, heads), None
    bias = torch.cat([dense.bias for dense in linears]).view(3, *heads)
    return linear(hidden, [dense.weight for dense in linears]).unflatten(1, (3, *heads)), bias


def _intermediate(parts: LayerParts, hidden: Tensor) -> Tensor:
    """(T, E) -> (T, F)."""
    dense, gelu = parts.intermediate, _GELU_CLASSES.get(type(parts.activation))
    if gelu is None or not is_plain(dense, nn.Linear):
        out: Tensor = parts.activation(dense(hidden))
        return out
    return linear(hidden, dense.weight, dense.bias, activation=gelu)


def _sublayer_end(
    end: SublayerEnd, x: Tensor, residual: Tensor, rng_state: Tensor | None, *, without_bias: bool = False
) -> Tensor:
    """norm(residual + dropout(dense(x))): x (T, E) or (T, F), residual (T, E) -> (T, E).

    With `without_bias`, x (T, E) is the output of `end.dense` without its bias.
    """
    dense, norm, dropout = end
    if not (is_plain_norm(norm) and is_supported_dropout(dropout)):
        out: Tensor = norm(dropout(x + dense.bias if without_bias else dense(x)) + residual)
        return out
    p = _dropout_p(dropout)
    x, bias = (x, dense.bias) if without_bias else linear_defer_bias(x, dense)
    return add_norm(x, bias, residual, norm, dropout_p=p, rng_state=rng_state if p else None)
