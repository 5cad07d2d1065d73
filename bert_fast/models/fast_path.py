"""A layer computed from its parameters without a call of its modules or of the ops' public functions.

Those check their arguments, and modules look up their attributes: for a layer on a short text that takes a sixth of
MiniLM's time, and in training a third of the host's time for a forward pass (`benchmarks.models.host_time`: 548 and
359 us on a busy AMD EPYC, Zen 5). Here everything is looked up and checked at once, and the result is the same to the
bit. A layer in which a module is not plain has no fast path, and is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bert_fast.kernels._common.checks import LARGEST, SMALLEST, compute_dtype
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.philox import dropout_state
from bert_fast.kernels._common.times import Size, size_of_rows
from bert_fast.kernels.linear_int8.op import FEED_FORWARD
from bert_fast.models.activations import GELU_ACTIVATIONS
from bert_fast.models.int8 import Int8Linear, attention_dtype
from bert_fast.models.layers import (
    BertAttention,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)
from bert_fast.models.plain import has_hooks, is_plain_tensor


class LayerOps(NamedTuple):
    """The implementation of each op of a layer."""

    linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    add_layer_norm: Callable[..., Tensor]

    @classmethod
    def select(cls, hidden: Tensor, attention: Size | None = None) -> LayerOps | None:
        """What impl="auto" selects for hidden (T, E), and attention of this size.

        None where autocast would cast `hidden`, while tracing and with global module hooks: then the modules are
        called.
        """
        if torch.compiler.is_compiling() or _has_any_global_hook() or compute_dtype(hidden) != hidden.dtype:
            return None
        sizes = {"attention": attention, "add_layer_norm": size_of_rows(hidden.shape[0], hidden.shape[1])}
        return cls(*(OPS[op].select("auto", hidden, size=sizes.get(op)) for op in cls._fields))


class LinearParams(NamedTuple):
    """The tensors of a linear layer, as its op takes them."""

    weight: tuple[Tensor, ...]  # of an Int8Linear: values, scale and sums
    bias: Tensor
    input_range: tuple[Tensor | None, ...]  # of an Int8Linear: one element, else none

    @classmethod
    def from_module(cls, dense: nn.Linear | Int8Linear) -> LinearParams:
        """The tensors of a plain layer; LookupError where it has no bias, or where an Int8Linear would do more or
        refuse."""
        if type(dense) is nn.Linear:
            weight, bias = _parameters(dense, nn.Linear, "weight", "bias")
            return cls((weight,), bias, ())
        state = _plain_state(dense, Int8Linear)
        if state["training"] or state["observed_range"] is not None or state["_parameters"] or torch.is_grad_enabled():
            raise LookupError
        buffers = state["_buffers"]
        weights = (buffers["values"], buffers["scale"], buffers["sums"])
        return cls(weights, buffers["bias"], (buffers["input_range"],))


class LayerFastPath(NamedTuple):
    """What a BertLayer of plain modules computes with."""

    heads: int
    head_size: int
    gelu: str
    linears: list[LinearParams]  # qkv, attention output, intermediate, output
    norms: list[tuple[Tensor, Tensor, float]]  # after attention and after the layer: weight, bias, eps
    dropouts: tuple[float, float, float]  # of the probabilities, after attention and after the layer

    @classmethod
    def from_layer(cls, layer: nn.Module, hidden: Tensor) -> LayerFastPath | None:
        """None where a module of the layer is not plain, where the activation has no kernel, or where parameters or an
        eps don't fit: the error of the op's public function says more."""
        try:
            attention, intermediate, output = _children(layer, BertLayer, "attention", "intermediate", "output")
            self_attention, self_output = _children(attention, BertAttention, "self", "output")
            (qkv,) = _children(self_attention, BertSelfAttention, "qkv")
            dense, attention_norm = _children(self_output, BertSelfOutput, "dense", "LayerNorm")
            (up,) = _children(intermediate, BertIntermediate, "dense")
            down, output_norm = _children(output, BertOutput, "dense", "LayerNorm")
            linears = [LinearParams.from_module(module) for module in (qkv, dense, up, down)]
            norms = [(*_parameters(x, nn.LayerNorm, "weight", "bias"), x.eps) for x in (attention_norm, output_norm)]
            gelu = GELU_ACTIVATIONS[intermediate.hidden_act]
        except LookupError:
            return None
        tensors = [x for params in linears for x in (params.weight[0], params.bias)]
        tensors += [x for weight, bias, _ in norms for x in (weight, bias)]
        E, F = hidden.shape[1], up.out_features
        shapes = [(3 * E, E), (3 * E,), (E, E), (E,), (F, E), (F,), (E, F), (E,), (E,), (E,), (E,), (E,)]
        if [x.shape for x in tensors] != shapes or {x.device for x in tensors} != {hidden.device}:
            return None
        if len({len(params.weight) for params in linears}) > 1:  # some INT8, some not
            return None
        if not all(type(eps) is float and SMALLEST <= eps <= LARGEST for _, _, eps in norms):
            return None
        dropouts = (self_attention.dropout_p, self_output.dropout_p, output.dropout_p)
        return cls(self_attention.heads, self_attention.head_size, gelu, linears, norms, dropouts)

    def run(
        self,
        ops: LayerOps,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_states: Tensor | None,
        output_rows: Tensor | None,
    ) -> Tensor:
        """(T, E) -> (T, E), or (R, E): the arguments of `BertLayer.forward`."""
        (qkv, dense, up, down), (attention_norm, output_norm) = self.linears, self.norms
        places = [(0.0, None)] * 3 if rng_states is None else self._dropout(rng_states, hidden)
        int8 = len(qkv.weight) > 1
        linear = OPS["linear_int8"].select("auto", hidden) if int8 else ops.linear
        heads, scale = (3, self.heads, self.head_size), 1.0 / math.sqrt(self.head_size)
        if int8:
            x = linear(hidden, qkv.weight, None, None, *qkv.input_range, attention_dtype(hidden)).view(-1, *heads)
        else:
            x = linear(hidden, qkv.weight, None, None).view(-1, *heads)
        x = ops.attention(x, qkv.bias.view(heads), cu_seqlens, max_seqlen, scale, *places[0]).flatten(1)
        if output_rows is not None:
            x, hidden = x.index_select(0, output_rows), hidden.index_select(0, output_rows)
        if int8:
            x = linear(x, dense.weight, None, None, *dense.input_range, hidden.dtype)
        else:
            x = linear(x, dense.weight, None, None)
        weight, bias, eps = attention_norm
        p, state = places[1]
        hidden = ops.add_layer_norm(x, hidden, weight, bias, dense.bias, p, eps, state)
        del x  # its memory is reused by the next products
        if int8:
            feed_forward = FEED_FORWARD[linear]
            x = feed_forward(hidden, up.weight, up.bias, down.weight, self.gelu, *up.input_range, *down.input_range)
        else:
            x = linear(linear(hidden, up.weight, up.bias, self.gelu), down.weight, None, None)
        weight, bias, eps = output_norm
        p, state = places[2]
        return ops.add_layer_norm(x, hidden, weight, bias, down.bias, p, eps, state)

    def _dropout(self, rng_states: Tensor, hidden: Tensor) -> list[tuple[float, Tensor | None]]:
        """Probability and state of each place of dropout, as the public functions pass them."""
        states = zip(self.dropouts, rng_states.unbind(0), strict=True)
        return [(p, dropout_state(p, state, hidden)) for p, state in states]


def _plain_state(module: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """The attributes of a module that is plain but for its parameters; LookupError if it is not."""
    # This is `is_plain` without a call for each of its conditions. An attribute of an nn.Module that is no entry of its
    # __dict__ takes 1.3 us, an entry a tenth of that.
    if type(module) is not kind:
        raise LookupError
    state: dict[str, Any] = module.__dict__
    if (
        state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or (state["_forward_hooks"] and has_hooks(module))
        or "forward" in state
    ):
        raise LookupError
    return state


def _children(module: Any, kind: type[nn.Module], *names: str) -> list[Any]:
    """The children called `names` of a plain module without parameters; LookupError if it is not, or lacks one."""
    state = _plain_state(module, kind)
    modules = state["_modules"]
    if state["_parameters"]:
        raise LookupError
    return [modules[name] for name in names]


def _parameters(module: Any, kind: type[nn.Module], *names: str) -> list[Tensor]:
    """The parameters called `names` of a plain module; LookupError if it is not, or lacks one."""
    parameters = _plain_state(module, kind)["_parameters"]
    values = [parameters[name] for name in names]
    for x in values:
        if x is None or not is_plain_tensor(x):
            raise LookupError
    return values
