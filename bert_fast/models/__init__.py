"""The models: configuration, encoder, heads, and checkpoints in transformers' format."""

from bert_fast.models.bert import BertModel, BertPreTrainedModel
from bert_fast.models.bge_m3 import BgeM3Model
from bert_fast.models.checkpoint import from_hf, to_hf
from bert_fast.models.config import BertConfig
from bert_fast.models.heads import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bert_fast.models.multi_vector import MultiVectorModel, maxsim
from bert_fast.models.pretraining import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    ElectraForPreTraining,
)

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
    "BertPreTrainedModel",
    "BgeM3Model",
    "ElectraForPreTraining",
    "MultiVectorModel",
    "from_hf",
    "maxsim",
    "to_hf",
]
