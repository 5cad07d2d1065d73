"""Checkpoints in transformers' format: the names of the tensors both ways, reading, and writing.

Inside a model query, key and value are one tensor, `attention.self.qkv`; on disk they are three, as everywhere else.
Inside a model of another architecture the names are BERT's; on disk they are its own (`bert_fast.models.family`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bert_fast.models.family import Names, rename, to_ours, to_theirs
from bert_fast.models.files import (
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    find_file,
    write_file,
)

if TYPE_CHECKING:
    from bert_fast.models.bert import BertPreTrainedModel

_logger = logging.getLogger("bert_fast")

_PARTS = ("query", "key", "value")
_PACKED = re.compile(r"(.*\battention\.self\.)qkv\.(weight|bias)")
_SPLIT = re.compile(r"(.*\battention\.self\.)(query|key|value)\.(weight|bias)")
# Names of the first TensorFlow release, and buffers that older versions of transformers stored.
_OLD_NAMES = (
    (re.compile(r"\bLayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"\bLayerNorm\.beta$"), "LayerNorm.bias"),
)
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
_HEADS = re.compile(
    r"(?:pre_)?(cls\.predictions|cls\.seq_relationship|classifier|qa_outputs|(?:\w+\.)?pooler|lm_head|sequence_summary"
    r"|discriminator_predictions|generator_predictions|generator_lm_head|vocab_(?:transform|layer_norm|projector))\."
)
_DECODER, _BIAS = "cls.predictions.decoder", "cls.predictions.bias"


def to_hf(state_dict: Mapping[str, Tensor], names: Names = ()) -> dict[str, Tensor]:
    """Our names to transformers': each packed `qkv` becomes query, key and value.

    `names`: the `hf_names` of the model; those of BERT need none.
    """
    found: dict[str, Tensor] = {}
    for name, x in state_dict.items():
        if match := _PACKED.fullmatch(name):
            prefix, kind = match.groups()
            found.update({f"{prefix}{part}.{kind}": piece for part, piece in zip(_PARTS, x.chunk(3), strict=True)})
        else:
            found[name] = x
    return {to_theirs(name, names): x for name, x in found.items()}


def from_hf(state_dict: Mapping[str, Tensor], names: Names = ()) -> dict[str, Tensor]:
    """Transformers' names to ours; old names (gamma, beta) are renamed, stored position_ids dropped.

    `names`: the `hf_names` of the model; those of BERT need none.

    Raises ValueError where one of a layer's query, key and value is missing, or their shapes differ.
    """
    found: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for theirs, x in _modern_names(state_dict).items():
        name = to_ours(theirs, names)
        if match := _SPLIT.fullmatch(name):
            prefix, part, kind = match.groups()
            groups.setdefault(f"{prefix}qkv.{kind}", {})[part] = x
        else:
            found[name] = x
    for name, parts in groups.items():
        missing = [to_theirs(name.replace("qkv", part), names) for part in _PARTS if part not in parts]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}; expected query, key and value of every layer")
        shapes = {part: tuple(parts[part].shape) for part in _PARTS}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"{name.replace('qkv', '{query, key, value}')} differ in shape: {shapes}")
        found[name] = torch.cat([parts[part] for part in _PARTS])
    return found


def _modern_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, x in state_dict.items():
        if _BUFFERS.search(name):
            continue
        for pattern, new in _OLD_NAMES:
            name = pattern.sub(new, name)
        found[name] = x
    return found


def read(name_or_path: str | Path, *, allow_pickle: bool = False, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under the names they have there.

    Raises:
        FileNotFoundError: no weights, or only pickled ones and `allow_pickle` is False.
        ValueError: a file is damaged, or the index names a file that is absent.
    """
    if path := find_file(name_or_path, WEIGHTS_NAME, revision=revision):
        return _read_safetensors(path)
    if index := find_file(name_or_path, INDEX_NAME, revision=revision):
        return _read_sharded(index, name_or_path, revision)
    pickled = find_file(name_or_path, PICKLE_NAME, revision=revision)
    pickled_index = None if pickled else find_file(name_or_path, PICKLE_INDEX_NAME, revision=revision)
    if not pickled and not pickled_index:
        raise FileNotFoundError(f"{name_or_path} has no {WEIGHTS_NAME} and no {INDEX_NAME}")
    if not allow_pickle:
        raise FileNotFoundError(
            f"{name_or_path} has no {WEIGHTS_NAME}, only a pickled {(pickled or pickled_index or Path()).name}; "
            "pass allow_pickle=True to read it (weights only), or convert it to safetensors"
        )
    return _read_pickle(pickled) if pickled else _read_sharded(pickled_index, name_or_path, revision)  # type: ignore[arg-type]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return {name: x for name, x in stored.items() if isinstance(x, Tensor)}


def _read_sharded(index: Path, name_or_path: str | Path, revision: str | None) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of a checkpoint: expected JSON with a weight_map") from error
    found: dict[str, Tensor] = {}
    for filename in sorted(set(weight_map.values())):
        path = find_file(name_or_path, filename, revision=revision) if Path(filename).name == filename else None
        if path is None:
            raise ValueError(f"{index} names {filename}, which is not beside it")
        found.update(_read_safetensors(path) if filename.endswith(".safetensors") else _read_pickle(path))
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise ValueError(f"the files named by {index} lack {', '.join(missing)}")
    return found


def load(
    model: BertPreTrainedModel,
    stored: Mapping[str, Tensor],
    *,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    new_head: bool = False,
) -> None:
    """Fill the parameters of `model` from tensors under transformers' names; `from_pretrained` says what may differ."""
    own = model.state_dict()
    expected = own.keys() - _tied_names(model)
    names = model.hf_names
    stored, foreign = _matching_names(model, stored)
    found = from_hf(stored, names)
    if new_head:
        matches = {name: _HEADS.match(name) for name in found}
        found = {name: found[name] for name, match in matches.items() if not match or match[1].endswith("pooler")}
    wrong = [name for name in sorted(expected & found.keys()) if own[name].shape != found[name].shape]
    changed = {name.rpartition(".")[0] for name in wrong if ignore_mismatched_sizes and _HEADS.match(name)}
    anew = {name for name in expected if name.rpartition(".")[0] in changed}
    if wrong_shapes := [name for name in wrong if name not in anew]:
        listed = "; ".join(
            f"{to_theirs(name, names)} is {tuple(found[name].shape)}, expected {tuple(own[name].shape)}"
            for name in wrong_shapes
        )
        hint = " (ignore_mismatched_sizes=True initialises a head anew)" if all(map(_HEADS.match, wrong_shapes)) else ""
        raise ValueError(f"the checkpoint does not fit the configuration: {listed}{hint}")
    if wrong:
        listed = ", ".join(f"{to_theirs(name, names)} was {tuple(found[name].shape)}" for name in wrong)
        _logger.warning("of another shape in the checkpoint, initialised anew: %s", listed)
    missing = expected - found.keys() - anew
    new_heads = _whole_heads(missing | anew, expected) - anew
    unexpected = foreign | set(_hf_names(found.keys() - own.keys(), names))
    _report(_hf_names(missing - new_heads, names), _hf_names(new_heads, names), sorted(unexpected), strict)
    _initialise(model, missing | anew)
    with torch.no_grad():
        for name in expected - missing - anew:
            own[name].copy_(found[name])


def _tied_names(model: BertPreTrainedModel) -> set[str]:
    """Names under which a tied parameter appears a second time; they are neither stored nor expected."""
    if not (model.config.tie_word_embeddings and hasattr(model, "cls") and hasattr(model.cls, "predictions")):
        return set()
    return {f"{_DECODER}.weight", f"{_DECODER}.bias"} if model.config.architecture.lm_bias else {f"{_DECODER}.weight"}


def _matching_names(model: BertPreTrainedModel, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """`stored` with or without the encoder's prefix, as `model` has it, and the decoder's bias under both its names.

    And the names of tensors that another head has under a name that is ours, as `classifier.weight`.
    """
    names, base = model.hf_names, f"{model.config.architecture.base}."
    tensors = _modern_names(stored)
    has_prefix = any(name.startswith(base) for name in tensors)
    wants_prefix = model.base_model is not model
    if has_prefix and not wants_prefix:
        tensors = {name.removeprefix(base): x for name, x in tensors.items()}
    own = model.state_dict()
    theirs = to_hf(own, names)
    if wants_prefix and not has_prefix:
        of_encoder = [name for name in tensors if name.startswith("pooler.") or not _HEADS.match(name)]
        tensors = rename(tensors, [(name, base + name) for name in of_encoder if name not in theirs])
    bias, decoder_bias = (to_theirs(name, names) for name in (_BIAS, f"{_DECODER}.bias"))
    for name, other in ((bias, decoder_bias), (decoder_bias, bias)):
        if name in theirs and name not in tensors and other in tensors:
            tensors[name] = tensors[other]
    foreign = {name for name in tensors if to_theirs(to_ours(name, names), names) != name}
    return {name: x for name, x in tensors.items() if name not in foreign}, foreign


def _whole_heads(missing: set[str], expected: set[str]) -> set[str]:
    """The missing tensors of heads of which nothing was found."""
    heads = {match.group(1) for name in missing if (match := _HEADS.match(name))}
    absent = {head for head in heads if {name for name in expected if name.startswith(f"{head}.")} <= missing}
    return {name for name in missing if (match := _HEADS.match(name)) and match.group(1) in absent}


def _report(missing: list[str], new_heads: list[str], unexpected: list[str], strict: bool) -> None:
    unknown = [name for name in unexpected if not _HEADS.match(name)]
    if strict and (missing or unknown):
        parts = [f"it lacks {', '.join(missing)}"] if missing else []
        parts += [f"it has the unexpected {', '.join(unknown)}"] if unknown else []
        raise ValueError(
            f"the checkpoint does not fit the model: {'; '.join(parts)} (strict=False initialises the first anew and "
            "leaves the second out)"
        )
    if new_heads or missing:
        _logger.warning("not in the checkpoint, initialised anew: %s", ", ".join(sorted(new_heads + missing)))
    if unexpected:
        _logger.warning("in the checkpoint and left out: %s", ", ".join(unexpected))


def _hf_names(ours: Iterable[str], names: Names) -> list[str]:
    return sorted(to_hf({name: torch.empty(3, device="meta") for name in ours}, names))


def _initialise(model: BertPreTrainedModel, missing: set[str]) -> None:
    """Initialise the modules that own a missing parameter; what the checkpoint has is written over them afterwards."""
    for prefix, module in model.named_modules():
        if any(f"{prefix}.{name}" in missing for name, _ in module.named_parameters(recurse=False)):
            model.init_module(module)


def save(model: BertPreTrainedModel, folder: Path) -> None:
    """Write model.safetensors and config.json, each under a temporary name first."""
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder, or a path where one can be made")
    tied = _tied_names(model)
    named = {name: x for name, x in model.state_dict().items() if name not in tied}
    tensors = {name: x.detach().to("cpu").contiguous().clone() for name, x in to_hf(named, model.hf_names).items()}
    write_file(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    dtype = str(model.dtype).removeprefix("torch.")
    model.config.replace(architectures=[model.hf_class], dtype=dtype).save_pretrained(folder)
