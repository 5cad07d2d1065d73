"""The arguments of commands that must run where only torch is installed: info and verify, without jsonargparse.

They are written as those of the other commands (`cli/arguments.py`): dashes or underscores, `--json`, `--no-json` or
`--json false`, and lists with spaces, commas or brackets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from bert_fast._config import did_you_mean


def as_option(arguments: list[str], option: str) -> list[str]:
    """The arguments, with those before the first option given as `option`: `OP OP --json` is `--ops OP OP --json`."""
    return [option, *arguments] if arguments and not arguments[0].startswith("-") else arguments


class _Negated(argparse.Action):
    """`--no-NAME` sets NAME to False."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, False)


class _Names(argparse.Action):
    """Several names: `a b`, `a,b` or `[a, b]`; each of `choices_of_names`, if there are some."""

    def __init__(self, *arguments: Any, choices_of_names: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.choices_of_names = choices_of_names

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        text = ",".join(values).strip("[] ")
        names = [stripped for name in text.split(",") if (stripped := name.strip(" '\""))]
        for name in names:
            if self.choices_of_names and name not in self.choices_of_names:
                raise argparse.ArgumentError(self, f"has {name!r}; expected some of {', '.join(self.choices_of_names)}")
        setattr(namespace, self.dest, names)


class Parser(argparse.ArgumentParser):
    """A parser of options of type bool, int, float, str, a Literal, a list of these, or None as well.

    Errors are ValueErrors of one sentence.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        kind = options.get("type")
        if kind is not None:
            kind, choices = _without_none(kind), ()
            if get_origin(kind) is list:
                kind = get_args(kind)[0]
                options |= {"nargs": "+", "action": _Names}
            if get_origin(kind) is Literal:
                choices, kind = get_args(kind), str
            if kind is bool:
                (name,) = names
                negated = [name.replace("--", prefix) for prefix in ("--no-", "--no_")]
                super().add_argument(
                    *negated, dest=name[2:], nargs=0, action=_Negated, default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )
                options |= {"nargs": "?", "const": True}
            options["type"] = _READERS[kind]
            if choices and "action" in options:
                options["choices_of_names"] = choices
            elif choices:
                options["choices"] = choices
        dashed = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *dashed, **options)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The values of the options.

        Raises:
            ValueError: an argument is unknown or has a value of the wrong type.
        """
        try:
            parsed, unknown = self.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            raise ValueError(_sentence(error)) from None
        for argument in unknown:
            if not argument.startswith("--"):
                raise ValueError(f"unexpected argument {argument!r}; --help lists the options")
            name = argument.partition("=")[0]
            shown = [option for action in self._actions if action.help != argparse.SUPPRESS
                     for option in action.option_strings]  # fmt: skip
            raise ValueError(f"unknown option {name}{did_you_mean(name, shown)}; --help lists the options")
        return parsed

    def error(self, message: str) -> NoReturn:  # what argparse doesn't raise as an ArgumentError
        raise ValueError(message)


def _sentence(error: argparse.ArgumentError) -> str:
    name = str(error.argument_name).partition("/")[0]  # without the other spellings
    if error.message.startswith("expected"):  # at least one value
        return f"{name} has no value"
    if error.message.startswith("invalid choice"):
        value, _, choices = error.message.removeprefix("invalid choice: ").partition(" (choose from ")
        return f"{name} is {value}; expected one of {choices.rstrip(')')}"
    return f"{name} {error.message}"


def _without_none(kind: Any) -> Any:
    """T of `T | None`, else the type itself."""
    members = [member for member in get_args(kind) if member is not type(None)]
    return members[0] if get_origin(kind) in (Union, UnionType) and len(members) == 1 else kind


def _boolean(value: str) -> bool:
    if value.lower() not in ("true", "yes", "on", "false", "no", "off"):
        raise argparse.ArgumentTypeError(f"is {value!r}; expected true or false")
    return value.lower() in ("true", "yes", "on")


def _integer(value: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", value):
        raise argparse.ArgumentTypeError(f"is {value!r}; expected an integer")
    return int(value)


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {value!r}; expected a number") from None


_READERS = {bool: _boolean, int: _integer, float: _float, str: str}
