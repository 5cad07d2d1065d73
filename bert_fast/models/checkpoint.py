"""Checkpoints in transformers' format: the names of the tensors both ways, and matching them to a model.

In a model query, key and value are one tensor, `attention.self.qkv`; in a file they are three, as in transformers.
In a model the names are BERT's; in a file they are the architecture's own (`bert_fast.models.family`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.models.family import NamePairs, from_hf_name, rename_keys, to_hf_name
from bert_fast.models.int8 import RANGE
from bert_fast.models.storage import shorten

_logger = logging.getLogger("bert_fast")

_QKV = ("query", "key", "value")
_KINDS = "weight|bias|weight_int8|weight_scale|input_range"
_PACKED = re.compile(rf"(.*\battention\.self\.)qkv\.({_KINDS})")
_SPLIT = re.compile(rf"(.*\battention\.self\.)(query|key|value)\.({_KINDS})")
# Names of the first TensorFlow release, and buffers that older versions of transformers stored.
_OLD_NAMES = (
    (re.compile(r"\bLayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"\bLayerNorm\.beta$"), "LayerNorm.bias"),
)
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
NOT_STORED = "newly initialized, because not in the checkpoint"  # begins the warning that names such tensors
_HEADS = re.compile(
    r"(?:pre_)?(cls\.predictions|cls\.seq_relationship|classifier|qa_outputs|(?:\w+\.)?pooler|lm_head|sequence_summary"
    r"|discriminator_predictions|generator_predictions|generator_lm_head|vocab_(?:transform|layer_norm|projector))\."
)
# Prefixes of wrappers: DistributedDataParallel, torch.compile, Lightning, PEFT.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORD_EMBEDDING = "embeddings.word_embeddings.weight"
DECODER, DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_LM_BIAS = "cls.predictions.bias"


class ModelTensors(NamedTuple):
    """The tensors of a model, for matching with those of a checkpoint."""

    state: Mapping[str, Tensor]  # under our names
    tied: set[str]  # second names of tied parameters, which are neither stored nor expected
    names: NamePairs  # ours and transformers'
    base: str  # transformers' attribute of a model with a head that holds the encoder
    has_head: bool  # whether the encoder's names start with `base`
    ties_embeddings: bool  # whether the configuration ties the decoder to the word embedding


def to_hf(state_dict: Mapping[str, Tensor], names: NamePairs = ()) -> dict[str, Tensor]:
    """Rename our tensors to transformers' and split each packed `qkv` into query, key and value.

    Args:
        state_dict: a model's, or its gradients.
        names: the `hf_names` of the model; BERT's need none.
    """
    tensors: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        if match := _PACKED.fullmatch(name):
            prefix, kind = match.groups()
            thirds = (x,) * 3 if kind == RANGE else x.chunk(3)  # all three read the same input
            tensors.update({f"{prefix}{part}.{kind}": third for part, third in zip(_QKV, thirds, strict=True)})
        else:
            tensors[name] = x
    return {to_hf_name(name, names): x for name, x in tensors.items()}


def from_hf(state_dict: Mapping[str, Tensor], names: NamePairs = ()) -> dict[str, Tensor]:
    """Rename transformers' tensors to ours and concatenate query, key and value to `qkv`.

    Old names (gamma, beta) are read too; stored position_ids are dropped.

    Args:
        state_dict: the tensors of a checkpoint.
        names: the `hf_names` of the model; BERT's need none.

    Raises:
        ValueError: a layer lacks one of query, key and value, or their shapes differ.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for hf_name, x in modern_names(state_dict).items():
        name = from_hf_name(hf_name, names)
        if match := _SPLIT.fullmatch(name):
            prefix, part, kind = match.groups()
            groups.setdefault(f"{prefix}qkv.{kind}", {})[part] = x
        else:
            tensors[name] = x
    for name, parts in groups.items():
        missing = [to_hf_name(name.replace("qkv", part), names) for part in _QKV if part not in parts]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}; expected query, key and value of every layer")
        shapes = {part: tuple(parts[part].shape) for part in _QKV}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"{name.replace('qkv', '{query, key, value}')} differ in shape: {shapes}")
        if not name.endswith(f".{RANGE}"):
            tensors[name] = torch.cat([parts[part] for part in _QKV])
        elif all(torch.equal(parts[part], parts["query"]) for part in _QKV):
            tensors[name] = parts["query"]
        else:
            raise ValueError(f"{name.replace('qkv', '{query, key, value}')} differ; expected the range of one input")
    return tensors


def modern_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint without prefixes of wrappers, names of old releases and stored buffers."""
    tensors = {}
    for name, x in _without_wrappers(state_dict).items():
        if _BUFFERS.search(name):
            continue
        for pattern, new in _OLD_NAMES:
            name = pattern.sub(new, name)
        tensors[name] = x
    return tensors


def _without_wrappers(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state_dict` without the prefixes that wrappers put before every name."""
    state_dict = {name.replace("._orig_mod.", "."): x for name, x in state_dict.items()}
    while prefix := next((x for x in _WRAPPERS if state_dict and all(name.startswith(x) for name in state_dict)), ""):
        _logger.info("the prefix %r of every tensor's name in the checkpoint is ignored", prefix)
        state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict


def match_tensors(
    model: ModelTensors,
    stored: Mapping[str, Tensor],
    *,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    new_head: bool = False,
) -> dict[str, Tensor]:
    """Select a checkpoint's tensors for a model; `BertPreTrainedModel.from_pretrained` documents the options.

    Args:
        stored: the tensors of the checkpoint, under transformers' names.

    Returns:
        The tensors under our names. A parameter of the model that is not among them is to be initialized.

    Raises:
        ValueError: tensors are missing or unexpected, or their shapes differ from the model's.
    """
    expected, names = model.state.keys() - model.tied, model.names
    given = sorted(stored)
    stored, foreign = _match_prefix(model, stored)
    tensors = from_hf(stored, names)
    if new_head:
        matches = {name: _HEADS.match(name) for name in tensors}
        tensors = {name: tensors[name] for name, match in matches.items() if not match or match[1].endswith("pooler")}
    resized = _resized(model, tensors, ignore_mismatched_sizes=ignore_mismatched_sizes)
    missing = expected - tensors.keys() - resized
    _check_any(model, expected - missing, given)
    _check_dtypes(model, tensors, expected - missing)
    new_heads = _absent_heads(missing | resized, expected) - resized
    unexpected = foreign | set(_hf_names(tensors.keys() - model.state.keys(), names))
    _report(_hf_names(missing - new_heads, names), _hf_names(new_heads, names), sorted(unexpected), strict)
    return {name: tensors[name] for name in expected - missing - resized}


def _match_prefix(model: ModelTensors, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """`stored` with the encoder's prefix if the model has it, else without, and the LM bias under both its names.

    And the names of tensors that another head has under one of our names, such as `classifier.weight`.
    """
    names, prefix = model.names, f"{model.base}."
    tensors = modern_names(stored)
    has_prefix = any(name.startswith(prefix) for name in tensors)
    if has_prefix and not model.has_head:
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    hf_names = to_hf(model.state, names).keys()
    if model.has_head and not has_prefix:
        of_encoder = [name for name in tensors if name.startswith("pooler.") or not _HEADS.match(name)]
        tensors = rename_keys(tensors, [(name, prefix + name) for name in of_encoder if name not in hf_names])
    bias, decoder_bias = (to_hf_name(name, names) for name in (_LM_BIAS, DECODER_BIAS))
    aliases = [(bias, decoder_bias), (decoder_bias, bias)]
    if model.ties_embeddings:  # the weight may be stored under either name
        word = to_hf_name(f"bert.{WORD_EMBEDDING}" if model.has_head else WORD_EMBEDDING, names)
        decoder = to_hf_name(DECODER, names)
        aliases += [(word, decoder), (decoder, word)]
    for name, other in aliases:
        if name in hf_names and name not in tensors and other in tensors:
            tensors[name] = tensors[other]
    foreign = {name for name in tensors if to_hf_name(from_hf_name(name, names), names) != name}
    return {name: x for name, x in tensors.items() if name not in foreign}, foreign


def tied_pairs_differ(model: ModelTensors, stored: Mapping[str, Tensor]) -> list[str]:
    """The names in a checkpoint of parameters that the model ties, but that have different values there.

    Args:
        stored: the tensors of the checkpoint, under transformers' names.
    """
    if not model.tied:
        return []
    tensors, _ = _match_prefix(model, stored)
    pairs = [(f"bert.{WORD_EMBEDDING}", DECODER), (_LM_BIAS, DECODER_BIAS)]
    names = [tuple(to_hf_name(name, model.names) for name in pair) for pair in pairs if pair[1] in model.tied]
    return [
        f"{first} and {second}"
        for first, second in names
        if first in tensors and second in tensors and not torch.equal(tensors[first], tensors[second])
    ]


def _check_any(model: ModelTensors, matched: set[str], stored: list[str]) -> None:
    """ValueError if the checkpoint has no tensor of the encoder: all of it would be random."""
    if not model.state or any(not _HEADS.match(name) for name in matched):
        return
    expected = to_hf_name(next(iter(model.state)), model.names)
    hint = _adapter_hint(stored)
    if prefix := next((name.removesuffix(expected) for name in stored if name.endswith(f".{expected}")), ""):
        hint = f" (its names begin with {prefix!r}: remove that)"
    listed = shorten(stored) or "no tensor at all"
    raise ValueError(f"the checkpoint has none of the encoder's tensors, such as {expected}: it has {listed}{hint}")


def _adapter_hint(names: Iterable[str]) -> str:
    if any(map(_ADAPTER.search, names)):
        return " (of a PEFT adapter: save the result of its merge_and_unload())"
    return ""


def _check_dtypes(model: ModelTensors, tensors: Mapping[str, Tensor], matched: set[str]) -> None:
    for name in sorted(matched):
        accepted = (torch.int8,) if model.state[name].dtype == torch.int8 else _FLOATS
        if (dtype := tensors[name].dtype) not in accepted:
            expected = ", ".join(str(x).removeprefix("torch.") for x in accepted)
            expected = f"one of {expected}" if len(accepted) > 1 else expected
            raise ValueError(
                f"{name} is {str(dtype).removeprefix('torch.')} in the checkpoint; expected {expected} "
                "(of quantized checkpoints, those of bert_fast.quantize are supported)"
            )


def _resized(model: ModelTensors, tensors: dict[str, Tensor], *, ignore_mismatched_sizes: bool) -> set[str]:
    """The parameters of every head module that has another shape in the checkpoint; ValueError for other parameters."""
    expected = model.state.keys() - model.tied
    mismatched = [x for x in sorted(expected & tensors.keys()) if model.state[x].shape != tensors[x].shape]
    modules = {name.rpartition(".")[0] for name in mismatched if ignore_mismatched_sizes and _HEADS.match(name)}
    resized = {name for name in expected if name.rpartition(".")[0] in modules}
    if wrong := [name for name in mismatched if name not in resized]:
        shapes = [f"{tuple(tensors[name].shape)}, expected {tuple(model.state[name].shape)}" for name in wrong]
        names = [to_hf_name(name, model.names) for name in wrong[:3]]
        listed = "; ".join(f"{name} is {x}" for name, x in zip(names, shapes, strict=False))
        listed += f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = " (ignore_mismatched_sizes=True initializes a new head)" if all(map(_HEADS.match, wrong)) else ""
        raise ValueError(f"the checkpoint does not fit the configuration: {listed}{hint}")
    if mismatched:
        listed = ", ".join(f"{to_hf_name(name, model.names)} was {tuple(tensors[name].shape)}" for name in mismatched)
        _logger.warning("newly initialized, because the shape in the checkpoint differs: %s", listed)
    return resized


def _absent_heads(missing: set[str], expected: set[str]) -> set[str]:
    """The missing tensors of heads of which the checkpoint has no tensor."""
    heads = {match.group(1) for name in missing if (match := _HEADS.match(name))}
    absent = {head for head in heads if {name for name in expected if name.startswith(f"{head}.")} <= missing}
    return {name for name in missing if (match := _HEADS.match(name)) and match.group(1) in absent}


def _report(missing: list[str], new_heads: list[str], unexpected: list[str], strict: bool) -> None:
    unknown = [name for name in unexpected if not _HEADS.match(name)]
    if strict and (missing or unknown):
        parts = [f"it lacks {shorten(missing)}"] if missing else []
        parts += [f"it has the unexpected {shorten(unknown)}{_adapter_hint(unknown)}"] if unknown else []
        raise ValueError(
            f"the checkpoint does not fit the model: {'; '.join(parts)} (strict=False initializes missing tensors and "
            "ignores unexpected ones)"
        )
    if new_heads or missing:
        _logger.warning("%s: %s", NOT_STORED, ", ".join(sorted(new_heads + missing)))
    if unexpected:
        _logger.warning("in the checkpoint and not used: %s", shorten(unexpected))


def _hf_names(names: Iterable[str], pairs: NamePairs) -> list[str]:
    return sorted(to_hf({name: torch.empty(3, device="meta") for name in names}, pairs))


def to_stored(model: ModelTensors) -> dict[str, Tensor]:
    """The tensors that a checkpoint of the model has: on the CPU, under transformers' names, tied ones once."""
    named = {name: x for name, x in model.state.items() if name not in model.tied}
    return {name: x.detach().to("cpu").contiguous().clone() for name, x in to_hf(named, model.names).items()}
