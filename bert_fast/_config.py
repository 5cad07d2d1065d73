"""Configuration dataclasses: types and checks of their values, and building them from mappings. Imports no torch."""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a message about the unknown `word`: the most similar of `choices`, "" if none is similar."""
    similar = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else ""


class _TypeOrChoiceError(Exception):
    """A value is not of a type, or not among the choices; the message says what is expected."""

    def __init__(self, expected: str, kind: type[Exception] = TypeError) -> None:
        super().__init__(expected)
        self.kind = kind


def convert_fields(options: Any, prefix: str = "") -> None:
    """Convert the values of a dataclass to the types of its fields, in place, and check its Literal fields.

    A number may be a scalar of numpy or torch, or text (YAML 1.1 reads 3e-5 as text); a bool may be the text true or
    false; a list or tuple any sequence or one-dimensional array; text a path; a dataclass a mapping or namespace.

    Args:
        options: a dataclass, frozen or not, which calls this first in `__post_init__`.
        prefix: of the names in messages, such as "optimizer.".

    Raises:
        TypeError: a value is of another type; the message names the field.
        ValueError: the value of a Literal field is not among its choices.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        try:
            converted = _converted(value, hint)
        except _TypeOrChoiceError as error:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise error.kind(f"{prefix}{name} is {shown}; expected {error}") from None
        if converted is not value:
            object.__setattr__(options, name, converted)


def _converted(value: Any, hint: Any) -> Any:
    """`value` as an instance of `hint`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _as_union(value, args)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            similar = did_you_mean(value, args) if isinstance(value, str) else ""
            raise _TypeOrChoiceError(f"one of {', '.join(map(str, args))}{similar}", ValueError)
    elif origin in (list, tuple):
        return _as_sequence(value, origin, args)
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise _TypeOrChoiceError("a mapping")
        return {key: _converted(item, args[1]) for key, item in value.items()}
    elif is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
        if not isinstance(value, Mapping) and not hasattr(value, "__dict__"):
            raise _TypeOrChoiceError(f"a mapping or {hint.__name__}")  # type: ignore[union-attr]
        return from_mapping(hint, value)  # type: ignore[arg-type]
    elif hint is str:
        return _as_text(value)
    elif hint in (bool, int, float):
        return _as_number(value, hint)
    return value


def _as_union(value: Any, hints: Iterable[Any]) -> Any:
    expected: list[str] = []
    kind: type[Exception] = TypeError
    for hint in hints:
        if hint is type(None):
            if value is None:
                return None
            expected.append("none")
            continue
        try:
            return _converted(value, hint)
        except _TypeOrChoiceError as error:
            expected.append(str(error).partition("; ")[0])
            kind = ValueError if error.kind is ValueError else kind
    raise _TypeOrChoiceError(" or ".join(expected), kind)


def _as_sequence(value: Any, origin: type, hints: tuple[Any, ...]) -> Any:
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()
    expected = {int: "integers", float: "numbers", str: "texts"}.get(hints[0], "values")
    count = len(hints) if origin is tuple and Ellipsis not in hints else None
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        raise _TypeOrChoiceError(f"a list of {expected}" if count is None else f"{count} {expected}")
    try:
        return origin(_converted(item, hints[0]) for item in value)
    except _TypeOrChoiceError as error:
        raise _TypeOrChoiceError(f"a list of {expected}", error.kind) from None


def _as_text(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _TypeOrChoiceError("text")
    return text


def _as_number(value: Any, kind: type) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if kind is bool:
        value = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise _TypeOrChoiceError("true or false")
        return value
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if kind is float:
            return number
        if number.is_integer():
            return int(number)
    raise _TypeOrChoiceError("an integer" if kind is int else "a number")


def _parsed(text: str) -> Any:
    """The number that `text` is, else `text`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def check_finite(options: Any) -> None:
    """ValueError if a number of the dataclass `options`, also one in a list, is infinite or NaN."""
    for field in fields(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} is {value}; expected a finite number")


def check_fraction(name: str, value: float | None) -> None:
    """ValueError unless `value` is None or in [0, 1)."""
    check(value is None or 0.0 <= value < 1.0, f"{name} is {value}; expected 0 <= {name} < 1")


def from_mapping(kind: type, values: Any) -> Any:
    """An instance of the dataclass `kind` from a mapping or namespace; `convert_fields` converts nested ones.

    Raises:
        ValueError: a key is not a field of the dataclass.
    """
    values = dict(values) if isinstance(values, Mapping) else dict(vars(values))
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        names = [field.name for field in fields(kind)]
        raise ValueError(
            f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(names)}{did_you_mean(unknown[0], names)}"
        )
    return kind(**values)


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
