"""The arguments of commands that must run where only torch is installed: info and verify, without jsonargparse.

They are written as those of the other commands (`cli/arguments.py`): dashes or underscores, `--json`, `--no-json` or
`--json false`, and lists with spaces, commas or brackets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from bert_fast._config import did_you_mean


class _Negated(argparse.Action):
    """`--no-NAME` sets NAME to False."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, False)


class _Names(argparse.Action):
    """Several names: `a b`, `a,b` or `[a, b]`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        text = ",".join(values).strip("[] ")
        names = [name.strip(" '\"") for name in text.split(",")]
        setattr(namespace, self.dest, [name for name in names if name])


class Parser(argparse.ArgumentParser):
    """A parser whose options have the type bool, int or `list[str] | None`; errors are ValueErrors of one sentence."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        kind = options.get("type")
        if kind is bool:
            (name,) = names
            negated = [name.replace("--", prefix) for prefix in ("--no-", "--no_")]
            super().add_argument(*negated, dest=name[2:], nargs=0, action=_Negated, help=argparse.SUPPRESS)
            options |= {"type": _boolean, "nargs": "?", "const": True}
        elif kind is int:
            options["type"] = _integer
        elif kind is not None:
            options |= {"type": str, "nargs": "+", "action": _Names}
        return super().add_argument(*names, **options)

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
    if error.message.startswith("expected"):  # at least one value
        return f"{error.argument_name} has no value"
    return f"{error.argument_name} {error.message}"


def _boolean(value: str) -> bool:
    if value.lower() not in ("true", "yes", "on", "false", "no", "off"):
        raise argparse.ArgumentTypeError(f"is {value!r}; expected true or false")
    return value.lower() in ("true", "yes", "on")


def _integer(value: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", value):
        raise argparse.ArgumentTypeError(f"is {value!r}; expected an integer")
    return int(value)
