"""Where transformers' models keep what the kernels need: the classes of each architecture, and the parts of a layer.

RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA repeat BERT's modules under their own class names; DistilBERT has others.
Nothing here imports transformers: a module that holds a model has imported it.
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
# The ends of the class names of a layer's blocks. transformers 4.57 has a class for each way to compute attention.
_BLOCKS = ("Layer", "Attention", "SelfAttention", "SdpaSelfAttention", "SelfOutput", "Intermediate", "Output")
_DISTILBERT_BLOCKS = (
    "TransformerBlock",
    "FFN",
    "DistilBertSelfAttention",
    "MultiHeadSelfAttention",
    "DistilBertSdpaAttention",
)


class End(NamedTuple):
    """The end of a sublayer: norm(residual + dropout(dense(x)))."""

    dense: Any
    norm: Any
    dropout: Any


class Parts(NamedTuple):
    """A layer's modules; `attention` is the one that has the dropout of the probabilities, `heads` are (N, D)."""

    attention: Any
    qkv: tuple[Any, Any, Any]
    heads: tuple[int, int]
    attended: End
    up: Any
    activation: Any
    down: End

    def leaves(self) -> Iterator[nn.Module]:
        """The modules that compute."""
        yield from (*self.qkv, *self.attended, *self.down, self.up)
        if isinstance(self.activation, nn.Module):
            yield self.activation


def _blocks(layer: Any) -> Iterator[Any]:
    """The modules that hold others, each after the one that holds it."""
    yield from (layer, layer.attention, layer.attention.self, layer.attention.output, layer.intermediate, layer.output)


def _parts(layer: Any) -> Parts:
    module, inner = layer.attention.self, layer.intermediate
    return Parts(
        module,
        (module.query, module.key, module.value),
        (module.num_attention_heads, module.attention_head_size),
        _end(layer.attention.output),
        inner.dense,
        inner.intermediate_act_fn,
        _end(layer.output),
    )


def _end(block: Any) -> End:
    return End(block.dense, block.LayerNorm, block.dropout)


def _distilbert_blocks(layer: Any) -> Iterator[Any]:
    yield from (layer, layer.attention, layer.ffn)


def _distilbert_parts(layer: Any) -> Parts:
    module, inner = layer.attention, layer.ffn
    return Parts(
        module,
        (module.q_lin, module.k_lin, module.v_lin),
        (module.n_heads, module.attention_head_size),
        End(module.out_lin, layer.sa_layer_norm, _NO_DROPOUT),
        inner.lin1,
        inner.activation,
        End(inner.lin2, layer.output_layer_norm, inner.dropout),
    )


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers.

    Attributes:
        base: the encoder model's name inside a model with a head.
        model, answers, encoder, embeddings: its classes; `answers` is that of question answering.
        pooler: its class, or None.
        blocks: the classes of a layer's modules that hold others.
        stack: the name of the module that has the layers.
        blocks_of, parts_of: of a layer. The second can be asked once all of the first are what they were.
    """

    base: str
    model: type[Any]
    answers: type[Any]
    encoder: type[Any]
    embeddings: type[Any]
    pooler: type[Any] | None
    blocks: tuple[type[Any], ...]
    stack: str
    blocks_of: Callable[[Any], Iterator[Any]]
    parts_of: Callable[[Any], Parts]


def layouts() -> Iterator[Layout]:
    """Those of the architectures that have been imported."""
    for model_type in ARCHITECTURES:
        if _home(model_type) in sys.modules:
            yield _layout(model_type)


def layout_of(kind: type[nn.Module]) -> Layout | None:
    """That of an encoder model's class, or of one for question answering."""
    return next((layout for layout in layouts() if issubclass(kind, (layout.model, layout.answers))), None)


def _home(model_type: str) -> str:
    name = model_type.replace("-", "_")
    return f"transformers.models.{name}.modeling_{name}"


@cache
def _layout(model_type: str) -> Layout:
    hf, architecture = sys.modules[_home(model_type)], ARCHITECTURES[model_type]
    prefix = architecture.prefix
    distilbert = model_type == "distilbert"
    names = _DISTILBERT_BLOCKS if distilbert else [prefix + end for end in _BLOCKS]
    return Layout(
        architecture.base,
        getattr(hf, f"{prefix}Model"),
        getattr(hf, f"{prefix}ForQuestionAnswering"),
        getattr(hf, "Transformer" if distilbert else f"{prefix}Encoder"),
        getattr(hf, "Embeddings" if distilbert else f"{prefix}Embeddings"),
        getattr(hf, f"{prefix}Pooler") if architecture.pooler else None,
        tuple(getattr(hf, name) for name in names if hasattr(hf, name)),
        "transformer" if distilbert else "encoder",
        _distilbert_blocks if distilbert else _blocks,
        _distilbert_parts if distilbert else _parts,
    )
