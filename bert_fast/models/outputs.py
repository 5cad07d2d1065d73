"""What the models return: transformers' fields, by attribute, by key and, without the absent ones, by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree

# Fields that transformers does not have are read by name only, so that tuples unpack as with transformers.
_BESIDE = {"beside": True}


@dataclass
class ModelOutput:
    """Base of the outputs: `out.loss`, `out["loss"]`, `out[0]`, `out[:2]`, `out.to_tuple()`.

    Fields that are None are left out of the keys and of the tuple.
    """

    def __init_subclass__(cls) -> None:
        _pytree.register_pytree_node(
            cls,
            lambda output: (output.values(), output.keys()),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def keys(self) -> list[str]:
        """The names of the fields that are there."""
        return [item.name for item in fields(self) if getattr(self, item.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are there."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """The names and the fields that are there."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field `name`, `default` where it is absent."""
        return getattr(self, name) if name in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that transformers' output of this name has, without those that are None."""
        listed = [getattr(self, item.name) for item in fields(self) if not item.metadata.get("beside")]
        return tuple(value for value in listed if value is not None)

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
    """Of `BertModel`. last_hidden_state (B, S, E), zeros at padding, or (T, E) where packed; pooler_output (B, E)."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """Of `BertForPreTraining`. loss = mlm_loss + next_sentence_loss; prediction_logits (B, S, V) or (T, V).

    mlm_loss, next_sentence_loss, mlm_correct and mlm_count (masked tokens predicted rightly, and all of them) are read
    by name only.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
    mlm_loss: Tensor | None = field(default=None, metadata=_BESIDE)
    next_sentence_loss: Tensor | None = field(default=None, metadata=_BESIDE)
    mlm_correct: Tensor | None = field(default=None, metadata=_BESIDE)
    mlm_count: Tensor | None = field(default=None, metadata=_BESIDE)


@dataclass
class MaskedLMOutput(ModelOutput):
    """Of `BertForMaskedLM`. logits (B, S, V) or (T, V); mlm_correct and mlm_count are read by name only."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
    mlm_correct: Tensor | None = field(default=None, metadata=_BESIDE)
    mlm_count: Tensor | None = field(default=None, metadata=_BESIDE)


@dataclass
class ElectraForPreTrainingOutput(ModelOutput):
    """Of `ElectraForPreTraining`. logits (B, S), zeros at padding, or (T,): above 0 where a word was replaced."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class NextSentencePredictorOutput(ModelOutput):
    """Of `BertForNextSentencePrediction`. logits (B, 2)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Of `BertForSequenceClassification`. logits (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Of `BertForTokenClassification`. logits (B, S, num_labels), zeros at padding, or (T, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Of `BertForQuestionAnswering`. start_logits and end_logits (B, S), the lowest finite value at padding."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """Of `BertForMultipleChoice`. logits (B, choices)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: States | None = None
    attentions: States | None = None
