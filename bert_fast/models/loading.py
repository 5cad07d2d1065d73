"""The arguments of `from_pretrained` and `save_pretrained`: what they accept, and what they mean."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bert_fast._device import resolve_device
from bert_fast.models.config import BertConfig
from bert_fast.models.files import HUB_OPTIONS, Source
from bert_fast.models.settings import refuse_keywords

if TYPE_CHECKING:
    from bert_fast.models.base import BertPreTrainedModel

_FROM_PRETRAINED = [
    "config",
    "dtype",
    "torch_dtype",
    "device_map",
    "strict",
    "allow_pickle",
    "ignore_mismatched_sizes",
    "new_head",
]
_SAVE_PRETRAINED = ("state_dict", "is_main_process", "safe_serialization")
# Keywords of transformers' save_pretrained: the values that change nothing here.
_FOREIGN_SAVE: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, None),
    "push_to_hub": (False, None),
    "save_peft_format": (True, None),
    "max_shard_size": (None,),
    "variant": (None,),
    "token": (None,),
    "save_function": (None,),
    "save_original_format": (True, None),
    "distributed_checkpoint": (False, None),
}


def read_config(model: type[BertPreTrainedModel], config: Any, source: Source, settings: dict[str, Any]) -> BertConfig:
    """The configuration of `source`, or `config`, with the `settings` that were given to `model.from_pretrained`.

    Raises:
        TypeError: a setting is unknown, or `config` is no configuration and no folder of one.
        ValueError: a setting is wrong.
    """
    caller = f"{model.__name__}.from_pretrained"
    arguments = (*_FROM_PRETRAINED, *HUB_OPTIONS, *model.init_arguments)
    if config is None or isinstance(config, (str, os.PathLike)):
        source = source if config is None else source.at(config)
        return BertConfig.from_source(source, settings, caller=caller, arguments=arguments)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"config is of type {type(config).__name__}; expected a BertConfig, the folder of one, or None")
    if not settings and isinstance(config, BertConfig):
        return config
    return BertConfig.with_overrides(config.to_dict(), settings, caller=caller, arguments=arguments)


def check_flags(**flags: Any) -> None:
    """TypeError unless every value is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False")


def parameter_dtype(dtype: Any, torch_dtype: Any, stored: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that `dtype`, or its old name `torch_dtype`, asks for; float32 if neither is given.

    Args:
        stored: the tensors of the checkpoint, for "auto".

    Raises:
        TypeError: it is neither a torch.dtype nor a str.
        ValueError: it is no dtype of parameters, or both are given and differ.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype is {dtype!r} and torch_dtype, its old name, is {torch_dtype!r}; give one of them")
    dtype = torch_dtype if dtype is None else dtype
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return next((x.dtype for x in stored.values() if x.is_floating_point()), torch.float32)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype is of type {type(dtype).__name__}; expected a torch.dtype, its name, or 'auto'")
    if found not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}; expected float32, float64, float16, bfloat16 or 'auto'")
    return found


def single_device(device_map: Any) -> torch.device:
    """The device that `device_map` names, as a device, its name or number, or {"": device}; the CPU if it is None.

    "auto" is the first GPU, or the CPU where there is none.

    Raises:
        TypeError: it is of another type, or asks to split the model.
        ValueError: this machine has no such device.
    """
    device = device_map
    if isinstance(device, Mapping) and len(device) == 1:
        (device,) = device.values()
    if device is None:
        return torch.device("cpu")
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(
            f"device_map is {reprlib.repr(device_map)}; expected one device, its name or its number: a model is never "
            "split"
        )
    found = resolve_device(f"cuda:{device}" if isinstance(device, int) else str(device))
    if found.type == "meta":
        raise ValueError("device_map is 'meta', on which parameters have no values; expected 'cpu', for example")
    return found


def check_save_keywords(model: BertPreTrainedModel, **keywords: Any) -> None:
    """TypeError for the keywords of `save_pretrained` that are unknown or not supported."""
    caller = f"{type(model).__name__}.save_pretrained"
    for name, value in keywords.items():
        if name not in _FOREIGN_SAVE:
            refuse_keywords(caller, {name: value}, (*_SAVE_PRETRAINED, *_FOREIGN_SAVE))
        if not any(value is accepted for accepted in _FOREIGN_SAVE[name]):
            shown = "a value" if name == "token" else repr(value)
            raise TypeError(
                f"{caller} does not support {name}={shown}; it writes one safetensors file: upload the folder with "
                "huggingface_hub, or shard it with transformers"
            )
