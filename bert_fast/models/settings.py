"""The checks of a configuration's values, and of the keywords of `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

# The smallest and largest value of each count. Larger ones are no BERT: they would only exhaust the memory.
COUNTS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (0, 2**8),
    "num_attention_heads": (1, 2**12),
    "intermediate_size": (1, 2**20),
    "max_position_embeddings": (1, 2**24),
    "type_vocab_size": (0, 2**16),
    "num_labels": (0, 2**20),
    "embedding_size": (1, 2**16),
}
MAX_PARAMETERS = 10**11
PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "qa_dropout",
    "seq_classif_dropout",
    "summary_first_dropout",
    "summary_last_dropout",
)
_FLAGS = ("tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict")
_TEXTS = ("hidden_act", "model_type")
_OPTIONAL_TEXTS = ("problem_type", "dtype", "classifier_pooling")

# Settings of transformers' configurations that are kept and written back, but not used here.
OTHER_SETTINGS = frozenset(
    [
        "add_cross_attention",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_pooling",
        "cls_token_id",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "is_decoder",
        "is_encoder_decoder",
        "mask_token_id",
        "position_embedding_type",
        "prefix",
        "pruned_heads",
        "quantization_config",
        "sep_token_id",
        "sinusoidal_pos_embds",
        "summary_activation",
        "summary_first_dropout",
        "summary_last_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tie_weights_",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "unk_token_id",
        "use_cache",
    ]
)
# Keywords of transformers' from_pretrained without a meaning here: the values that change nothing, and what to do.
_NO_KERNEL_CHOICE = "bert_fast's kernels compute attention; bert_fast.use_impl chooses among them"
_FOREIGN_KEYWORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_implementation": ((None,), _NO_KERNEL_CHOICE),
    "experts_implementation": ((None,), _NO_KERNEL_CHOICE),
    "use_flash_attention_2": ((None, False), _NO_KERNEL_CHOICE),
    "use_safetensors": ((None, True), "allow_pickle=True reads pytorch_model.bin where there is no safetensors file"),
    "weights_only": ((None, True), "a pickle is never allowed to run code"),
    "trust_remote_code": ((None, False), "code in a checkpoint is never run"),
    "low_cpu_mem_usage": ((None, False, True), ""),
    "output_loading_info": ((None, False), 'the logger "bert_fast" names missing and unused tensors'),
    "return_unused_kwargs": ((None, False), "an unknown keyword is an error"),
    "quantization_config": ((None,), "bert_fast.quantize makes an INT8 model of a loaded one"),
    "load_in_8bit": ((None, False), "bert_fast.quantize makes an INT8 model of a loaded one"),
    "load_in_4bit": ((None, False), "bert_fast.quantize makes an INT8 model of a loaded one"),
    "state_dict": ((None,), "call load_hf(state_dict) on a new model"),
    "use_auth_token": ((None,), "pass token"),
    **dict.fromkeys(
        [
            "_commit_hash",
            "_from_auto",
            "_from_pipeline",
            "adapter_kwargs",
            "adapter_name",
            "allow_all_kernels",
            "device_mesh",
            "disable_mmap",
            "distributed_config",
            "from_flax",
            "from_tf",
            "fusion_config",
            "generation_config",
            "gguf_file",
            "kernel_config",
            "key_mapping",
            "max_memory",
            "mirror",
            "offload_buffers",
            "offload_folder",
            "offload_state_dict",
            "proxies",
            "resume_download",
            "tp_plan",
            "tp_size",
            "tqdm_class",
            "use_kernels",
            "variant",
        ],
        ((None, False), ""),
    ),
}
# What must never be in a config.json, though older releases wrote it.
NEVER_WRITTEN = frozenset(
    {"token", "subfolder", "revision", "cache_dir", "local_files_only", "force_download", "device_map"}
    | (_FOREIGN_KEYWORDS.keys() - {"quantization_config"})
)

_SECRET = re.compile(r"(^|_)((auth|access|api|hf|hub|bearer)_?(token|key)|password|secret)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name may be a secret or belong to a download: it is neither kept nor written."""
    return name in NEVER_WRITTEN or bool(_SECRET.search(name))


def refuse_keywords(caller: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """TypeError for the keywords that `caller` does not have.

    Args:
        given: keywords and their values. One of transformers' own is accepted with a value that changes nothing.
        known: the keywords that `caller` has, to suggest one.
    """
    for name, value in given.items():
        if name in _FOREIGN_KEYWORDS:
            harmless, hint = _FOREIGN_KEYWORDS[name]
            if any(value is accepted for accepted in harmless):
                continue
            expected = " or ".join(map(repr, harmless))
            secret = "token" in name or name == "proxies"  # whose addresses can have passwords
            shown = "a value" if secret else reprlib.repr(value)
            raise TypeError(
                f"{caller} does not support {name}={shown}; expected {expected}" + (f" ({hint})" if hint else "")
            )
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "it is neither an argument nor a setting of this model"
        raise TypeError(f"{caller} got an unexpected keyword {name!r}; {hint}")


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError where a setting has a wrong type, is not finite, or is larger than any BERT's.

    Args:
        settings: names and values of a `BertConfig`, those of `extra` among them.
    """
    for name, value in settings.items():
        if name in COUNTS:
            check_count(name, value, *COUNTS[name])
        elif name in PROBABILITIES:
            optional = name == "classifier_dropout" and value is None
            if not optional and not (_is_number(value) and 0.0 <= value < 1.0):
                raise ValueError(f"{name} is {reprlib.repr(value)}; expected a probability in [0, 1)")
        elif name in ("layer_norm_eps", "initializer_range"):
            # The kernels add eps to a variance in float32, whose smallest normal number is 2^-126.
            low = 2.0**-126 if name == "layer_norm_eps" else 0
            if not _is_number(value) or not low <= value <= 1e6:
                raise ValueError(f"{name} is {reprlib.repr(value)}; expected a number in [{low:.3g}, 1e6]")
        elif name in _FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {reprlib.repr(value)}; expected True or False")
        elif name in _TEXTS or (name in _OPTIONAL_TEXTS and value is not None):
            if not isinstance(value, str):
                raise ValueError(f"{name} is {reprlib.repr(value)}; expected a str")
        elif name == "pad_token_id" and value is not None:
            check_count(name, value, 0, COUNTS["vocab_size"][1])
        elif name == "architectures" and value is not None and not _is_list_of(value, str):
            raise ValueError(f"{name} is {reprlib.repr(value)}; expected a list of str, or None")


def check_quantization(value: Any) -> None:
    """ValueError unless the quantization_config of a config.json is None or what save_pretrained writes."""
    # Folders saved before have the method as quant_method.
    accepted = isinstance(value, Mapping) and value.get("method", value.get("quant_method")) == "bert_fast"
    accepted = accepted and value.get("bits") == 8
    if value is not None and not accepted:
        raise ValueError(
            f"quantization_config is {reprlib.repr(value)}, which is not supported; expected None, or that of a model "
            "that bert_fast.quantize made"
        )


def check_count(name: str, value: Any, minimum: int, maximum: int) -> None:
    """ValueError unless `value` is an int (no bool) in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected an integer of at least {minimum}")
    if value > maximum:
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected at most {maximum}")


def check_size(settings: Mapping[str, int]) -> None:
    """ValueError where the sizes describe a model of more than `MAX_PARAMETERS` parameters."""
    E, F, L = settings["hidden_size"], settings["intermediate_size"], settings["num_hidden_layers"]
    embedded = settings["vocab_size"] + settings["max_position_embeddings"] + settings["type_vocab_size"]
    count = embedded * settings.get("embedding_size", E) + L * E * (4 * E + 2 * F)
    if count > MAX_PARAMETERS:
        listed = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise ValueError(
            f"the settings describe a model of {count:.1e} parameters; expected at most {MAX_PARAMETERS:.0e} ({listed})"
        )


def label_names(name: str, labels: Any) -> dict[int, str]:
    """id2label with integer keys. ValueError unless it is a mapping from indices to names."""
    if not isinstance(labels, Mapping) or len(labels) > COUNTS["num_labels"][1]:
        raise ValueError(f"{name} is {reprlib.repr(labels)}; expected a mapping from indices to names")
    names: dict[int, str] = {}
    for key, label in labels.items():
        index = _index(key)
        if index is None or not _is_label(label):
            raise ValueError(
                f"{name} has the entry {reprlib.repr(key)}: {reprlib.repr(label)}; expected an index and a name"
            )
        names[index] = str(label)
    return names


def label_indices(labels: Any) -> dict[str, int]:
    """label2id. ValueError unless it is a mapping from names to indices."""
    if not isinstance(labels, Mapping):
        raise ValueError(f"label2id is {reprlib.repr(labels)}; expected a mapping from names to indices")
    indices: dict[str, int] = {}
    for label, value in labels.items():
        index = _index(value)
        if index is None or not _is_label(label):
            raise ValueError(
                f"label2id has the entry {reprlib.repr(label)}: {reprlib.repr(value)}; expected a name and an index"
            )
        indices[str(label)] = index
    return indices


def _index(value: Any) -> int | None:
    """An int, or the decimal digits of one, as JSON keys have them; None for other values."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)
    return None if isinstance(value, bool) or not hasattr(type(value), "__index__") else int(value)


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and -1e300 < value < 1e300


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)
