"""What a folder's files say of texts and vectors, read here again: an error in bert_fast.models is not repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast._io import read_json

POOLINGS = ("mean", "cls", "max", "pooler", "mean_sqrt_len_tokens", "lasttoken")
Step = Callable[[Tensor], Tensor]  # a module on a vector, in any floating dtype


class Folder:
    """How texts become vectors.

    Without modules.json that is the entry of config.json that `bert-fast finetune` writes for the task
    sentence-embedding, else mean pooling.

    Attributes:
        transformer: the folder of the weights.
        pooling: one of `POOLINGS`.
        normalize: whether the result has length 1, where no module follows that changes it.
        steps: Dense, LayerNorm and Normalize, in their order; empty for a Normalize alone.
        prompt: the text of default_prompt_name, "" without one.
        include_prompt: whether its tokens are pooled.
        truncate_dim: the number of components that are kept; None for all.
        max_seqlen: the maximum number of tokens; None for the model's.
        keep: what truncation keeps: head, tail, or head_tail (a quarter from the head).
        lowercase: whether texts are converted to lower case first.

    Raises:
        ValueError: a file is no JSON, or names a module, pooling or activation that is not computed here.
    """

    def __init__(self, folder: Path) -> None:
        self.transformer, self.pooling, self.normalize = folder, "mean", False
        self.steps: tuple[Step, ...] = ()
        self.prompt, self.include_prompt, self.keep = "", True, "head"
        self.truncate_dim: int | None = None
        self.max_seqlen: int | None = None
        self.lowercase = False
        if (folder / "modules.json").is_file():
            self._read_modules(folder)
        if self.max_seqlen is None and (self.transformer / "tokenizer_config.json").is_file():
            length = read_json(self.transformer / "tokenizer_config.json", None).get("model_max_length")
            self.max_seqlen = int(length) if length and length >= 2 else None  # 1e30 where there is none
        if (self.transformer / "config.json").is_file():
            self._read_task(read_json(self.transformer / "config.json", None).get("bert_fast_task") or {})

    def _read_modules(self, folder: Path) -> None:
        settings_file = folder / "config_sentence_transformers.json"
        settings = read_json(settings_file, None) if settings_file.is_file() else {}
        if (name := settings.get("default_prompt_name")) is not None:
            self.prompt = (settings.get("prompts") or {}).get(name) or ""
        self.truncate_dim = settings.get("truncate_dim")
        steps: list[Step] = []
        for module in _entries(folder / "modules.json"):
            kind, path = module["type"].rsplit(".", 1)[-1], folder / module.get("path", "")
            if kind == "Transformer":
                self._read_transformer(path)
            elif kind == "Pooling":
                values = read_json(path / "config.json", None)
                self.pooling, self.include_prompt = _pooling(values, path), values.get("include_prompt", True)
            elif kind == "Normalize":
                steps.append(_normalize)
            elif kind in _READERS:
                steps.append(_READERS[kind](path))
            elif kind != "Dropout":
                raise ValueError(
                    f"{folder / 'modules.json'} has the module {module['type']}; expected Transformer, Pooling, Dense, "
                    "LayerNorm, Normalize and Dropout (check_encoder of bert_fast.invariants takes your own reference)"
                )
        if steps == [_normalize] and self.truncate_dim is None:
            self.normalize = True  # so that another pooling or normalization can be requested
        else:
            self.steps = tuple(steps)

    def _read_transformer(self, path: Path) -> None:
        self.transformer = path
        for file in sorted(path.glob("sentence_*_config.json")):
            settings = read_json(file, None)
            arguments = settings.get("processor_kwargs") or settings.get("tokenizer_args") or {}
            self.max_seqlen = arguments.get("model_max_length") or settings.get("max_seq_length") or self.max_seqlen
            self.lowercase = bool(settings.get("do_lower_case", False))

    def _read_task(self, task: dict[str, Any]) -> None:
        text = task.get("text") or {}
        self.keep = text.get("long", "head")
        if task.get("name") == "sentence-embedding" and not (self.transformer / "modules.json").is_file():
            self.max_seqlen = text.get("max_length", self.max_seqlen)
            self.pooling = (task.get("options") or {}).get("pooling", "mean")


def _normalize(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a module, from model.safetensors or pytorch_model.bin."""
    from safetensors.torch import load_file

    if (path / "model.safetensors").is_file():
        return load_file(path / "model.safetensors")
    tensors: dict[str, Tensor] = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return tensors


def _dense(path: Path) -> Step:
    """activation(x W^T + b), plus x or its projection with use_residual."""
    values, tensors = read_json(path / "config.json", None), _tensors(path)
    name = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    kind: Any = getattr(torch.nn, name.rsplit(".", 1)[-1], None)
    if kind is not torch.nn.Identity and getattr(kind, "__module__", "") != "torch.nn.modules.activation":
        raise ValueError(f"{path / 'config.json'}: activation_function is {name!r}; expected an activation of torch.nn")
    return partial(_apply_dense, tensors, kind(), bool(values.get("use_residual", False)))


def _apply_dense(tensors: dict[str, Tensor], activation: Step, residual: bool, x: Tensor) -> Tensor:
    weights = {name: value.to(x) for name, value in tensors.items()}
    out = activation(torch.nn.functional.linear(x, weights["linear.weight"], weights.get("linear.bias")))
    if not residual:
        return out
    projection = weights.get("residual.weight")
    return out + (x if projection is None else torch.nn.functional.linear(x, projection))


def _layer_norm(path: Path) -> Step:
    return partial(_apply_layer_norm, _tensors(path))


def _apply_layer_norm(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = tensors["norm.weight"].to(x), tensors["norm.bias"].to(x)
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias)


_READERS: dict[str, Callable[[Path], Step]] = {"Dense": _dense, "LayerNorm": _layer_norm}


def _entries(path: Path) -> list[dict[str, Any]]:
    """The modules of modules.json."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(entries, list) or not all(
        isinstance(x, dict) and isinstance(x.get("type"), str) for x in entries
    ):
        raise ValueError(f"{path} is no list of modules with a type")
    return entries


def _pooling(settings: dict[str, Any], path: Path) -> str:
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        chosen = [modes] if isinstance(modes, str) else list(modes)
    else:
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean"}
        names |= {"pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken"}
        names["pooling_mode_weightedmean_tokens"] = "weightedmean"
        chosen = [name for key, name in names.items() if settings.get(key)]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ValueError(f"{path / 'config.json'} pools by {', '.join(chosen)}; expected one of {', '.join(POOLINGS)}")
    return str(chosen[0])
