"""Settings as YAML, from files and from the command line: read within limits, and never as the name of a class.

jsonargparse builds objects of any importable class that a value names (`class_path`, `init_args`). No setting of
bert_fast is a class, so every text is checked here before jsonargparse sees it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import get_loader, set_loader

from bert_fast._config import did_you_mean

MODE = "bert_fast"  # of the parsers: jsonargparse reads each value by `load`
_OF_CLASSES = ("class_path", "init_args", "dict_kwargs", "__path__", "__orig__", "__default_config__")
_MAX_CHARACTERS, _MAX_NODES = 2**22, 10**5


def load(text: str) -> Any:
    """The value of a YAML text; JSON is YAML too.

    Raises:
        YAMLError: it is not YAML, or has a tag other than YAML's own.
        ValueError: it is larger than any settings are, also after its aliases are expanded; an alias contains itself;
            or a key belongs to jsonargparse's description of a class.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"the settings have {len(text):,} characters; expected at most {_MAX_CHARACTERS:,}")
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is not None:
        nodes = _count(root, {})
        if nodes > _MAX_NODES:
            raise ValueError(f"the settings have {nodes:.3g} values; expected at most {_MAX_NODES:,}")
    return get_loader("yaml")(text)


set_loader(MODE, load, (yaml.YAMLError,))


def refuse_classes(name: str, where: str = "") -> None:
    """ValueError if a part of the dotted setting `name` belongs to jsonargparse's description of a class."""
    for part in name.removesuffix("+").split("."):
        if part in _OF_CLASSES:
            raise ValueError(f"{where}{name} would name a class; no setting of bert_fast is a class")


def _count(node: Any, counted: dict[int, int]) -> int:
    """The number of nodes below `node`, with aliases expanded."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(f"the settings have an alias that contains itself, in line {node.start_mark.line + 1}")
        return counted[id(node)]
    if not isinstance(node, yaml.CollectionNode):
        return 1
    counted[id(node)] = 0
    items = node.value
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in items if isinstance(key, yaml.ScalarNode)]
        for name, times in Counter(names).items():
            refuse_classes(name)
            if times > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {name!r} is set {times} times; expected once")
        items = [item for pair in items for item in pair]
    total = 1 + sum(_count(item, counted) for item in items)
    counted[id(node)] = total
    return total


def read_file(path: str) -> dict[str, Any]:
    """The settings in a YAML file; "-" is stdin.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8, not YAML or no mapping, or `load` refuses it; the message names the file.
    """
    try:
        if path == "-":
            text = sys.stdin.read(_MAX_CHARACTERS + 1)
        else:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read(_MAX_CHARACTERS + 1)  # also of a file without an end
        values = load(text) if text.strip() else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return mapping(values, path)


def mapping(values: Any, where: str) -> dict[str, Any]:
    """`values`, or {} for None; ValueError unless it is a mapping whose keys are strings."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_short(values)}; expected settings, a mapping such as 'steps: 100'")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{where} has the key {_short(key)}; expected the name of a setting")
    return dict(values)


def check_nested(hint: Any, values: Any, where: str) -> None:
    """Check that dataclasses within the type `hint` are given as mappings of their fields, never by a name.

    Raises:
        ValueError: one is not a mapping, or has an unknown field; the message begins with `where`.
    """
    kind = _dataclass(hint)
    if kind is not None:
        if values is None:
            return
        hints = get_type_hints(kind)
        for name, value in mapping(values, where).items():
            if name not in hints:
                raise ValueError(f"{where}.{name} is unknown{did_you_mean(name, hints)}; expected {', '.join(hints)}")
            check_nested(hints[name], value, f"{where}.{name}")
    elif getattr(hint, "__origin__", None) is dict and _dataclass(get_args(hint)[1]) is not None:
        for name, value in mapping(values, where).items():
            if value is None:
                raise ValueError(f"{where}.{name} is empty; expected settings")
            check_nested(get_args(hint)[1], value, f"{where}.{name}")


def hint_at(hint: Any, names: list[str], where: str) -> Any:
    """The type of the setting `names` (keys and fields) within a setting of the type `hint`; None if it is any value.

    Raises:
        ValueError: a dataclass has no such field.
    """
    for name in names:
        kind = _dataclass(hint)
        if kind is not None:
            hints = get_type_hints(kind)
            if name not in hints:
                raise ValueError(f"{where}: unknown {name}{did_you_mean(name, hints)}; expected {', '.join(hints)}")
            hint = hints[name]
        elif getattr(hint, "__origin__", None) is dict:
            hint = get_args(hint)[1]
        else:
            return None
    return hint


def has_dataclass(hint: Any) -> bool:
    """Whether `hint` is a dataclass, possibly optional, or a dict of them."""
    of_dict = get_args(hint)[1:] if getattr(hint, "__origin__", None) is dict else ()
    return any(_dataclass(kind) is not None for kind in (hint, *of_dict))


def _dataclass(hint: Any) -> Any:
    """The dataclass X of a hint X or `X | None`, or None."""
    kinds = (
        (hint,) if isinstance(hint, type) else get_args(hint) if getattr(hint, "__origin__", None) is not dict else ()
    )
    return next((kind for kind in kinds if hasattr(kind, "__dataclass_fields__")), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
