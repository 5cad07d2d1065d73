"""bert_fast: a BERT encoder on custom kernels, for inference, pretraining and fine-tuning, and `fuse` for transformers.

The models and `fuse`, `unfuse`, `is_fused`, `register`, `quantize` and `freeze` are exported here; the kernels are in
`bert_fast.kernels`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_fast.integrations.attention_interface import register
    from bert_fast.integrations.freeze import freeze, unfreeze
    from bert_fast.integrations.fuse import fuse, is_fused, unfuse
    from bert_fast.integrations.quantize import quantize
    from bert_fast.models import (
        BertConfig,
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        ElectraForPreTraining,
    )

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "ElectraForPreTraining",
    "freeze",
    "fuse",
    "is_fused",
    "quantize",
    "register",
    "unfreeze",
    "unfuse",
]
_INTEGRATIONS = ("freeze", "fuse", "is_fused", "quantize", "register", "unfreeze", "unfuse")


def __getattr__(name: str) -> Any:
    # The models import torch, which takes a second that `bert-fast --help` need not wait for.
    if name in __all__:
        package = "bert_fast.integrations" if name in _INTEGRATIONS else "bert_fast.models"
        return getattr(import_module(package), name)
    raise AttributeError(f"module 'bert_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
