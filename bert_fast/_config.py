"""Configuration dataclasses: checks of their values, and building them from mappings. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_type_hints


def check(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a message about the unknown `word`: the most similar of `choices`, "" if none is similar."""
    similar = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def check_choices(options: Any) -> None:
    """ValueError if a Literal field of the dataclass `options` has a value that is not among its choices."""
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        value = getattr(options, name)
        if getattr(hint, "__origin__", None) is Literal and value not in choices:
            expected = ", ".join(map(str, choices))
            raise ValueError(f"{name} is {value!r}; expected one of {expected}{did_you_mean(value, choices)}")


def check_fraction(name: str, value: float | None) -> None:
    """ValueError unless `value` is None or in [0, 1)."""
    check(value is None or 0.0 <= value < 1.0, f"{name} is {value}; expected 0 <= {name} < 1")


def from_mapping(kind: type, values: Any) -> Any:
    """An instance of the dataclass `kind` from a mapping or namespace, whose values may be nested.

    Raises:
        ValueError: a key is not a field of the dataclass.
    """
    values = dict(values) if isinstance(values, dict) else dict(vars(values))
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        names = [field.name for field in fields(kind)]
        raise ValueError(
            f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(names)}{did_you_mean(unknown[0], names)}"
        )
    for name, value in values.items():
        if hasattr(hints[name], "__dataclass_fields__") and not isinstance(value, hints[name]):
            values[name] = from_mapping(hints[name], value)
        elif isinstance(value, list) and getattr(hints[name], "__origin__", None) is tuple:
            values[name] = tuple(value)
        elif value is not None and (inner := _dataclass_in(hints[name])) and not isinstance(value, inner):
            if getattr(hints[name], "__origin__", None) is dict:
                values[name] = {key: x if isinstance(x, inner) else from_mapping(inner, x) for key, x in value.items()}
            else:
                values[name] = from_mapping(inner, value)
    return kind(**values)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass X of a hint `dict[str, X]` or `X | None`, or None."""
    return next((kind for kind in get_args(hint) if hasattr(kind, "__dataclass_fields__")), None)


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted name: (before, now)} of the values that differ between two nested mappings."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            changed.update(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            changed[prefix + name] = (old, new)
    return changed
