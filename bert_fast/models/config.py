"""BertConfig: the settings of a model, with transformers' names and defaults."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bert_fast._io import read_json, write_text
from bert_fast.models import settings as checks
from bert_fast.models.activations import ACTIVATIONS
from bert_fast.models.family import ARCHITECTURES, Architecture, rename_keys
from bert_fast.models.files import CONFIG_NAME, HUB_OPTIONS, Source

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# name -> (layers, hidden size); the head size is 64, the intermediate size four times the hidden size.
# Turc et al., "Well-read students learn better", 2019, table 1; base and large: Devlin et al., 2018.
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}

# Settings of a config.json that change the computation and are not supported: (name, accepted values).
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("is_decoder", (False, None)),
    ("add_cross_attention", (False, None)),
    ("is_encoder_decoder", (False, None)),
    ("position_embedding_type", ("absolute", None)),
    ("pruned_heads", ({}, None)),
)
_SIZE_NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# Not kept. save_pretrained describes the quantization that a model has.
_DROPPED = ("transformers_version", "_name_or_path", "torch_dtype", "quantization_config")


def longest_input(config: Any) -> int:
    """The maximum length of a sequence: max_position_embeddings, less the rows that RoBERTa never uses.

    Args:
        config: a BertConfig, or transformers' configuration of any supported architecture.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    first = config.pad_token_id + 1 if architecture is not None and architecture.positions_after_padding else 0
    longest: int = config.max_position_embeddings - first
    return longest


def _override_names(architecture: Architecture) -> set[str]:
    """The settings that may replace those of a config.json of `architecture`, under their names here and there."""
    names = {item.name for item in fields(BertConfig)}
    return names | {*architecture.settings.values(), *architecture.defaults} | checks.OTHER_SETTINGS


def _without_replaced_labels(settings: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without the labels that do not fit the labels, or their number, in `overrides`."""
    given = {"num_labels", "id2label", "label2id"} & overrides.keys()
    id2label = settings.get("id2label")
    if not given:
        return settings
    if given == {"num_labels"} and isinstance(id2label, Mapping) and len(id2label) == overrides["num_labels"]:
        return settings
    return {name: x for name, x in settings.items() if name not in ("num_labels", "id2label", "label2id")}


@dataclass(kw_only=True)
class BertConfig:
    """The settings of a model, with the names and defaults of transformers' `BertConfig`.

    `from_dict` and `from_pretrained` also read the other architectures' settings, with their names and defaults.

    Attributes:
        model_type: a key of `bert_fast.models.family.ARCHITECTURES`.
        vocab_size: V, rows of the word embedding.
        hidden_size: E. `num_attention_heads` N must divide it.
        num_hidden_layers: L.
        intermediate_size: F.
        hidden_act: one of gelu (exact erf), gelu_new, gelu_fast, gelu_pytorch_tanh (all the tanh approximation),
            relu, silu, swish, tanh.
        pad_token_id: the row of the word embedding that starts at zero and gets no gradient; None for no such row.
        classifier_dropout: before a classifier; None for `hidden_dropout_prob`.
        num_labels, id2label, label2id: the classes of the heads; one that is None follows from the others.
        problem_type: loss of `BertForSequenceClassification`; None to infer it from the labels, as transformers does.
        extra: settings of a config.json that are not used here; `save_pretrained` writes them back.

    Raises:
        ValueError: a setting is out of range, or two settings contradict each other; the message names them.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    architectures: list[str] | None = None
    dtype: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:  # JSON has no NumPy scalars
                setattr(self, item.name, value.item())
        if not isinstance(self.model_type, str) or self.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model_type is {reprlib.repr(self.model_type)}; expected one of {', '.join(ARCHITECTURES)}"
            )
        if type(self.dtype).__module__ == "torch":  # a torch.dtype
            self.dtype = str(self.dtype).removeprefix("torch.")
        for name, value in self.architecture.fixed.items():
            setattr(self, name, value)
        self._complete_labels()
        self.validate()

    @property
    def architecture(self) -> Architecture:
        """The architecture called `model_type`."""
        return ARCHITECTURES[self.model_type]

    @property
    def input_size(self) -> int:
        """The width of the embeddings: hidden_size, or ELECTRA's embedding_size."""
        size: int = self.hidden_size
        return self.extra.get("embedding_size", size) if "embedding_size" in self.architecture.defaults else size

    @property
    def first_position(self) -> int:
        """The row of the position embedding of a sequence's first token; see `bert_fast.models.inputs.Sizes`."""
        if not self.architecture.positions_after_padding:
            return 0
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    @property
    def head_size(self) -> int:
        """D, the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def _complete_labels(self) -> None:
        if self.num_labels is not None:
            checks.check_settings({"num_labels": self.num_labels})
        if self.label2id is not None:
            self.label2id = checks.label_indices(self.label2id)
        if self.id2label is not None:
            self.id2label = checks.label_names("id2label", self.id2label)
        elif self.label2id is not None:
            self.id2label = {index: label for label, index in self.label2id.items()}
        else:
            count = 2 if self.num_labels is None else self.num_labels
            self.id2label = {index: f"LABEL_{index}" for index in range(count)}
        if self.num_labels is None:
            self.num_labels = len(self.id2label)
        if self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def validate(self) -> None:
        """Raise ValueError where a setting is out of range, or two settings contradict each other."""
        if not isinstance(self.extra, dict):
            raise ValueError(f"extra is {reprlib.repr(self.extra)}; expected a dict")
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        used = set(self.architecture.defaults) | {*checks.PROBABILITIES, "classifier_pooling"}
        checks.check_settings({**{name: x for name, x in self.extra.items() if name in used}, **settings})
        if not self.type_vocab_size and "type_vocab_size" not in self.architecture.fixed:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}; expected an integer of at least 1")
        self._check_positions()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads is {self.num_attention_heads}; "
                "expected hidden_size to be a multiple of num_attention_heads"
            )
        checks.check_size({name: settings[name] for name in _SIZE_NAMES} | {"embedding_size": self.input_size})
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id} and vocab_size is {self.vocab_size}; "
                "expected pad_token_id in [0, vocab_size), or None"
            )
        self._check_labels()

    def _check_positions(self) -> None:
        if not self.architecture.positions_after_padding:
            return
        if self.pad_token_id is None or self.max_position_embeddings <= self.first_position:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id} and max_position_embeddings is {self.max_position_embeddings}; "
                f"the positions of {self.model_type} start at pad_token_id + 1: expected pad_token_id below "
                "max_position_embeddings - 1"
            )

    def _check_labels(self) -> None:
        assert self.id2label is not None
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type is {self.problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}, or None"
            )
        if len(self.id2label) != self.num_labels:
            raise ValueError(
                f"num_labels is {self.num_labels} and id2label has {len(self.id2label)} entries; expected the same "
                "number (give only one of the two, and the other follows)"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type is 'single_label_classification' and num_labels is 1; expected at least 2 labels, "
                "or problem_type='regression'"
            )

    @classmethod
    def size(cls, name: str, **overrides: Any) -> BertConfig:
        """The configuration of a published size.

        Args:
            name: tiny, mini, small, medium, base or large.
            overrides: settings that replace those of the size.

        Raises:
            ValueError: there is no size of that name, or an override is wrong.
        """
        if name not in SIZES:
            raise ValueError(f"the size is {name!r}; expected one of {', '.join(SIZES)}")
        layers, hidden = SIZES[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
        }
        return cls(**{**sizes, **overrides})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """The configuration that a transformers config.json describes.

        Args:
            settings: the file's content; unknown keys are kept in `extra`.
            overrides: settings that replace those of the file. One that the architecture does not have, such as
                DistilBERT's type_vocab_size, keeps its only value.

        Raises:
            TypeError: an override is no setting of this model.
            ValueError: a setting is out of range, or it describes an unsupported model (a decoder, relative positions,
                pruned heads, a model that others quantized, another model type).
        """
        return cls.with_overrides(settings, overrides, caller=f"{cls.__name__}.from_dict")

    @classmethod
    def with_overrides(
        cls, settings: Mapping[str, Any], overrides: Mapping[str, Any], *, caller: str, arguments: Collection[str] = ()
    ) -> BertConfig:
        """`from_dict` on behalf of the function `caller`, an error's subject, which has other `arguments` as well."""
        model_type = {**settings, **overrides}.get("model_type", "bert")
        architecture = ARCHITECTURES.get(model_type if isinstance(model_type, str) else "", ARCHITECTURES["bert"])
        known = _override_names(architecture) | settings.keys()
        unknown = {name: value for name, value in overrides.items() if name not in known}
        checks.refuse_keywords(caller, unknown, known | {*arguments})
        to_ours = [(theirs, ours) for ours, theirs in architecture.settings.items()]
        overrides = {name: value for name, value in overrides.items() if name not in unknown}
        overrides = rename_keys(overrides, [*to_ours, ("torch_dtype", "dtype")])
        given_extra = overrides.pop("extra", {})
        merged = {**architecture.defaults, **_without_replaced_labels(rename_keys(settings, to_ours), overrides)}
        merged |= overrides
        for name, accepted in _UNSUPPORTED:
            if name in merged and merged[name] not in accepted:
                value = reprlib.repr(merged[name])
                raise ValueError(f"{name} is {value}, which is not supported; expected {accepted[0]!r}")
        checks.check_quantization(merged.get("quantization_config"))
        if merged.get("dtype") is None:
            merged["dtype"] = merged.get("torch_dtype")
        names = {item.name for item in fields(cls)} - {"extra"}
        dropped = names | {*_DROPPED}
        extra = {name: x for name, x in merged.items() if name not in dropped and not checks.is_secret(name)}
        return cls(**{name: merged[name] for name in names & merged.keys()}, extra={**given_extra, **extra})

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, as transformers reads it."""
        assert self.id2label is not None
        omitted = {"extra", *self.architecture.fixed}
        extra = {name: value for name, value in self.extra.items() if not checks.is_secret(name)}
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in omitted}
        if settings.pop("num_labels") == 2 and self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            settings.pop("id2label")
            settings.pop("label2id")
        else:
            settings["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return {**extra, **rename_keys(settings, self.architecture.settings.items())}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> BertConfig:
        """Read config.json, where there is none that of the subfolder that modules.json names for the Transformer.

        Args:
            name_or_path, subfolder ... force_download: see `bert_fast.models.files.Source`.
            overrides: settings that replace those of the file, for example `num_labels=3`.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            TypeError: an override is no setting of this model, or an argument has another type.
            ValueError: the file is not JSON, a setting is out of range, or it describes an unsupported model.
        """
        from bert_fast.models.sentence import transformer_source  # imports this module

        hub = (subfolder, revision, token, cache_dir, local_files_only, force_download)
        caller = f"{cls.__name__}.from_pretrained"
        source = transformer_source(Source(name_or_path, *hub))
        return cls.from_source(source, overrides, caller=caller, arguments=HUB_OPTIONS)

    @classmethod
    def from_source(
        cls, source: Source, overrides: Mapping[str, Any], *, caller: str, arguments: Collection[str] = ()
    ) -> BertConfig:
        """`from_pretrained` of a `Source`; the other arguments are those of `with_overrides`."""
        path = source.find(CONFIG_NAME)
        if path is None:
            raise FileNotFoundError(f"{source} has no {CONFIG_NAME}")
        settings = read_json(path)
        try:
            return cls.with_overrides(settings, overrides, caller=caller, arguments=arguments)
        except ValueError as error:
            where = f"{path} with {', '.join(overrides)} replaced" if overrides else str(path)
            raise ValueError(f"{where}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json to `folder`, atomically."""
        write_text(Path(folder) / CONFIG_NAME, self.to_json())

    def to_json(self) -> str:
        """The text of config.json. ValueError where a value of `extra` can't be written as JSON."""
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the configuration can't be written as JSON: {error}") from error

    def replace(self, **changes: Any) -> BertConfig:
        """A copy with `changes`."""
        if "num_labels" in changes:
            changes = {"id2label": None, "label2id": None, **changes}
        return replace(self, **changes)
