"""The layout of transformers' models: the classes of each architecture, and the modules of a layer.

RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA repeat BERT's modules under their own class names; DistilBERT's differ.
Nothing here imports transformers: a caller with a model has already imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from bert_fast.models.family import ARCHITECTURES

_NO_DROPOUT = nn.Identity()
# Suffixes of the class names of a layer's blocks. transformers 4.57 has a class for each attention implementation.
_BLOCKS = ("Layer", "Attention", "SelfAttention", "SdpaSelfAttention", "SelfOutput", "Intermediate", "Output")
_DISTILBERT_BLOCKS = (
    "TransformerBlock",
    "FFN",
    "DistilBertSelfAttention",
    "MultiHeadSelfAttention",
    "DistilBertSdpaAttention",
)


class SublayerEnd(NamedTuple):
    """The end of a sublayer: norm(residual + dropout(dense(x)))."""

    dense: Any
    norm: Any
    dropout: Any


class LayerParts(NamedTuple):
    """The modules of a layer."""

    attention: Any  # the module with the dropout of the probabilities
    qkv: tuple[Any, Any, Any]
    heads: tuple[int, int]  # (N, D)
    attention_output: SublayerEnd
    intermediate: Any
    activation: Any
    output: SublayerEnd

    def leaves(self) -> Iterator[nn.Module]:
        """The modules without children that compute something."""
        yield from (*self.qkv, *self.attention_output, *self.output, self.intermediate)
        if isinstance(self.activation, nn.Module):
            yield self.activation


def _layer_blocks(layer: Any) -> Iterator[Any]:
    """The modules with children, each after its parent."""
    yield from (layer, layer.attention, layer.attention.self, layer.attention.output, layer.intermediate, layer.output)


def _layer_parts(layer: Any) -> LayerParts:
    module, inner = layer.attention.self, layer.intermediate
    return LayerParts(
        module,
        (module.query, module.key, module.value),
        (module.num_attention_heads, module.attention_head_size),
        _sublayer_end(layer.attention.output),
        inner.dense,
        inner.intermediate_act_fn,
        _sublayer_end(layer.output),
    )


def _sublayer_end(block: Any) -> SublayerEnd:
    return SublayerEnd(block.dense, block.LayerNorm, block.dropout)


def _distilbert_blocks(layer: Any) -> Iterator[Any]:
    yield from (layer, layer.attention, layer.ffn)


def _distilbert_parts(layer: Any) -> LayerParts:
    module, inner = layer.attention, layer.ffn
    return LayerParts(
        module,
        (module.q_lin, module.k_lin, module.v_lin),
        (module.n_heads, module.attention_head_size),
        SublayerEnd(module.out_lin, layer.sa_layer_norm, _NO_DROPOUT),
        inner.lin1,
        inner.activation,
        SublayerEnd(inner.lin2, layer.output_layer_norm, inner.dropout),
    )


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers.

    Attributes:
        base: the attribute of a model with a head that holds the encoder model.
        model, question_answering, encoder, embeddings: classes.
        pooler: class, or None.
        blocks: classes of a layer's modules with children.
        stack: the attribute of the encoder model that holds the layers.
        blocks_of, parts_of: of a layer; `parts_of` requires that every module of `blocks_of` is one of `blocks`.
    """

    base: str
    model: type[Any]
    question_answering: type[Any]
    encoder: type[Any]
    embeddings: type[Any]
    pooler: type[Any] | None
    blocks: tuple[type[Any], ...]
    stack: str
    blocks_of: Callable[[Any], Iterator[Any]]
    parts_of: Callable[[Any], LayerParts]

    def layers(self, model: Any) -> Any:
        """The layers of an encoder model."""
        return getattr(model, self.stack).layer


def layouts() -> Iterator[Layout]:
    """The layouts of the architectures that have been imported."""
    for model_type in ARCHITECTURES:
        if _module_name(model_type) in sys.modules:
            yield _layout(model_type)


def layout_of(kind: type[nn.Module]) -> Layout | None:
    """The layout of an encoder class, or of a question answering class; None for other classes."""
    return next((layout for layout in layouts() if issubclass(kind, (layout.model, layout.question_answering))), None)


def _module_name(model_type: str) -> str:
    name = model_type.replace("-", "_")
    return f"transformers.models.{name}.modeling_{name}"


@cache
def _layout(model_type: str) -> Layout:
    hf, architecture = sys.modules[_module_name(model_type)], ARCHITECTURES[model_type]
    prefix = architecture.prefix
    distilbert = model_type == "distilbert"
    names = _DISTILBERT_BLOCKS if distilbert else [prefix + suffix for suffix in _BLOCKS]
    return Layout(
        architecture.base,
        getattr(hf, f"{prefix}Model"),
        getattr(hf, f"{prefix}ForQuestionAnswering"),
        getattr(hf, "Transformer" if distilbert else f"{prefix}Encoder"),
        getattr(hf, "Embeddings" if distilbert else f"{prefix}Embeddings"),
        getattr(hf, f"{prefix}Pooler") if architecture.pooler else None,
        tuple(getattr(hf, name) for name in names if hasattr(hf, name)),
        "transformer" if distilbert else "encoder",
        _distilbert_blocks if distilbert else _layer_blocks,
        _distilbert_parts if distilbert else _layer_parts,
    )
