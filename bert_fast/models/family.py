"""The supported architectures, as data: their names for tensors and settings, and where they differ from BERT.

Every model here has BERT's names and computation. An architecture describes how its checkpoints and its config.json
name things, what it lacks, which row of the position embedding comes first, and how its heads pool a sequence.

Sources: Liu et al., "RoBERTa", 2019; Conneau et al., "Unsupervised cross-lingual representation learning at scale",
2020; Martin et al., "CamemBERT", 2020; Sanh et al., "DistilBERT", 2019; Clark et al., "ELECTRA", 2020.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NamePairs = tuple[tuple[str, str], ...]  # (ours, transformers'), in the order in which ours are replaced


@dataclass(frozen=True)
class Pooling:
    """The pooling of a head that does not use the encoder's pooler: dropout(act(dense(dropout(first token)))).

    Attributes:
        activation: as `BertConfig.hidden_act`.
        input_dropout, output_dropout: the settings with the dropout probabilities; "classifier" is classifier_dropout,
            or hidden_dropout_prob where that is None; "" is no dropout.
        names: of the head's tensors.
        required: settings, and the only value of each that is supported.
    """

    activation: str
    input_dropout: str
    output_dropout: str
    names: NamePairs
    required: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """How an architecture differs from BERT.

    Attributes:
        model_type: its name in config.json.
        prefix: of transformers' class names.
        base: the attribute of a model with a head that holds the encoder.
        names: of the tensors.
        settings: names in config.json, ours to transformers'.
        defaults: of settings that config.json lacks, where they differ from BERT's.
        fixed: settings that the architecture does not have, and their values; they are not written.
        pooler: whether the encoder has a pooler.
        positions_after_padding: whether positions start at pad_token_id + 1 and skip padding tokens.
        lm_activation: of the masked-LM head; None for the encoder's.
        lm_bias: whether that head has a bias in addition to the decoder's.
        pooling: of the heads that don't use the encoder's pooler, by class name suffix.
        choice_dropout: the setting with the dropout before the multiple-choice classifier, as in `Pooling`.
    """

    model_type: str
    prefix: str
    base: str
    names: NamePairs = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pooler: bool = True
    positions_after_padding: bool = False
    lm_activation: str | None = None
    lm_bias: bool = True
    pooling: Mapping[str, Pooling] = field(default_factory=dict)
    choice_dropout: str = "classifier"

    def tensor_names(self, head: str) -> NamePairs:
        """The names of a model's tensors; `head` is its class name's suffix, such as "ForMaskedLM"."""
        head_names = self.pooling[head].names if head in self.pooling else ()
        return (("bert.", f"{self.base}."), *self.names, *head_names)


def to_hf_name(name: str, names: NamePairs) -> str:
    """Our name of a tensor to transformers'."""
    for ours, theirs in names:
        name = _replace(name, ours, theirs)
    return name


def from_hf_name(name: str, names: NamePairs) -> str:
    """Transformers' name of a tensor to ours."""
    for ours, theirs in reversed(names):
        name = _replace(name, theirs, ours)
    return name


def _replace(name: str, old: str, new: str) -> str:
    """Replace `old` by `new` where it starts at a dot or at the beginning."""
    return re.sub(rf"(?<![^.]){re.escape(old)}", new, name)


def rename_keys(values: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """`values` with each first name of `pairs` replaced by the second."""
    new_names = dict(pairs)
    return {new_names.get(name, name): value for name, value in values.items()}


# The models that every architecture has.
COMMON_MODELS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)
_CLASSIFIER_NAMES = (("classifier.", "classifier.out_proj."), ("pre_classifier.", "classifier.dense."))
_BERT = Architecture("bert", "Bert", "bert")
_ROBERTA = Architecture(
    "roberta",
    "Roberta",
    "roberta",
    names=(
        ("cls.predictions.transform.dense.", "lm_head.dense."),
        ("cls.predictions.transform.LayerNorm.", "lm_head.layer_norm."),
        ("cls.predictions.decoder.", "lm_head.decoder."),
        ("cls.predictions.bias", "lm_head.bias"),
    ),
    defaults={"pad_token_id": 1},
    positions_after_padding=True,
    lm_activation="gelu",
    pooling={"ForSequenceClassification": Pooling("tanh", "classifier", "classifier", _CLASSIFIER_NAMES)},
    choice_dropout="hidden_dropout_prob",
)
_DISTILBERT_POOLING = Pooling("relu", "", "seq_classif_dropout", names=())
_DISTILBERT = Architecture(
    "distilbert",
    "DistilBert",
    "distilbert",
    names=(
        ("encoder.layer.", "transformer.layer."),
        ("attention.self.query.", "attention.q_lin."),
        ("attention.self.key.", "attention.k_lin."),
        ("attention.self.value.", "attention.v_lin."),
        ("attention.output.dense.", "attention.out_lin."),
        ("attention.output.LayerNorm.", "sa_layer_norm."),
        ("intermediate.dense.", "ffn.lin1."),
        ("output.dense.", "ffn.lin2."),
        ("output.LayerNorm.", "output_layer_norm."),
        ("cls.predictions.transform.dense.", "vocab_transform."),
        ("cls.predictions.transform.LayerNorm.", "vocab_layer_norm."),
        ("cls.predictions.decoder.", "vocab_projector."),
    ),
    settings={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    defaults={"num_hidden_layers": 6, "qa_dropout": 0.1, "seq_classif_dropout": 0.2},
    fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "classifier_dropout": None},
    pooler=False,
    lm_bias=False,
    pooling={"ForSequenceClassification": _DISTILBERT_POOLING, "ForMultipleChoice": _DISTILBERT_POOLING},
)
_ELECTRA = Architecture(
    "electra",
    "Electra",
    "electra",
    names=(
        ("cls.predictions.transform.", "generator_predictions."),
        ("cls.predictions.decoder.", "generator_lm_head."),
    ),
    defaults={
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "summary_last_dropout": 0.1,
    },
    pooler=False,
    lm_activation="gelu",
    lm_bias=False,
    pooling={
        "ForSequenceClassification": Pooling("gelu", "classifier", "classifier", _CLASSIFIER_NAMES),
        "ForMultipleChoice": Pooling(
            "gelu",
            "summary_first_dropout",
            "summary_last_dropout",
            names=(("pre_classifier.", "sequence_summary.summary."),),
            required=(
                ("summary_type", "first"),
                ("summary_use_proj", True),
                ("summary_activation", "gelu"),
                ("summary_proj_to_labels", False),
            ),
        ),
    },
)
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        _BERT,
        _ROBERTA,
        replace(_ROBERTA, model_type="xlm-roberta", prefix="XLMRoberta"),
        replace(_ROBERTA, model_type="camembert", prefix="Camembert"),
        _DISTILBERT,
        _ELECTRA,
    )
}
