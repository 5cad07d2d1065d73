"""The models' outputs, with transformers' fields: read by attribute, by key or by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree

# Fields that transformers does not have are not in the tuple, so that it unpacks as with transformers.
_NAME_ONLY = {"name_only": True}


@dataclass
class ModelOutput:
    """Base class of the outputs: `out.loss`, `out["loss"]`, `out[0]`, `out[:2]`, `out.to_tuple()`.

    The keys and the tuple are without the fields that are None.
    """

    def __init_subclass__(cls) -> None:
        _pytree.register_pytree_node(
            cls,
            lambda output: (output.values(), output.keys()),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def keys(self) -> list[str]:
        """The names of the fields that are not None."""
        return [item.name for item in fields(self) if getattr(self, item.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """The names and values of the fields that are not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field `name`, or `default` where it is None."""
        return getattr(self, name) if name in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields of transformers' output of this name that are not None."""
        values = [getattr(self, item.name) for item in fields(self) if not item.metadata.get("name_only")]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key!r} is not in this output, which has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


States = tuple[Tensor, ...]


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of `BertModel`. last_hidden_state (B, S, E), zeros at padding, or (T, E); pooler_output (B, E)."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """Output of `BertForPreTraining`. loss = mlm_loss + next_sentence_loss; prediction_logits (B, S, V) or (T, V).

    mlm_loss, next_sentence_loss, mlm_correct and mlm_count (of the masked tokens, those predicted correctly, and all)
    are not in the tuple.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
    mlm_loss: Tensor | None = field(default=None, metadata=_NAME_ONLY)
    next_sentence_loss: Tensor | None = field(default=None, metadata=_NAME_ONLY)
    mlm_correct: Tensor | None = field(default=None, metadata=_NAME_ONLY)
    mlm_count: Tensor | None = field(default=None, metadata=_NAME_ONLY)


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of `BertForMaskedLM`. logits (B, S, V) or (T, V); mlm_correct and mlm_count are not in the tuple."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
    mlm_correct: Tensor | None = field(default=None, metadata=_NAME_ONLY)
    mlm_count: Tensor | None = field(default=None, metadata=_NAME_ONLY)


@dataclass
class ElectraForPreTrainingOutput(ModelOutput):
    """Output of `ElectraForPreTraining`. logits (B, S), zeros at padding, or (T,); above 0 for a replaced token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class NextSentencePredictorOutput(ModelOutput):
    """Output of `BertForNextSentencePrediction`. logits (B, 2)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of `BertForSequenceClassification`. logits (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Output of `BertForTokenClassification`. logits (B, S, num_labels), zeros at padding, or (T, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of `BertForQuestionAnswering`. start_logits and end_logits (B, S), the lowest finite value at padding."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """Output of `BertForMultipleChoice`. logits (B, choices)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
