"""The arguments of a command: what people write, rewritten to what jsonargparse reads.

    --output-dir x           --output_dir=x            a dash or an underscore
    --lr 1e-4                --optimizer.lr=1e-4       the end of a name, if only one setting ends so
    --overwrite              --overwrite=true          also --no-overwrite, --overwrite false
    --sources a.txt b.txt    --sources=["a.txt", "b.txt"]     also a.txt,b.txt
    --sources+ c.txt         added to what a file or an argument set before, not to the default
    --config a.yaml          merged in order, before all arguments; --recipe NAME likewise

Names that no setting has are refused with the most similar one. Files and values are checked by `settings`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from bert_fast._config import did_you_mean
from bert_fast.cli import settings

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_CONFIG = ("config", "recipe")


def make_parser(prog: str, description: str | None) -> ArgumentParser:
    """A parser that reads values by `settings.load` and imports nothing that a value names."""
    with contextlib.suppress(TypeError):  # an older jsonargparse: `settings` refuses such values alone
        # Of its own accord jsonargparse looks up the dataclasses within a mapping, those of multitask, by their names.
        set_parsing_settings(
            import_path_denylist=["*"], import_path_allowlist=["bert_fast.finetune", "bert_fast.tasks"]
        )
    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, parser_mode=settings.MODE, default_env=False
    )


def parse(
    parser: ArgumentParser,
    arguments: Sequence[str],
    recipe: Callable[[str], str],
    more_help: Callable[[str], str] | None = None,
) -> Namespace:
    """Parse the arguments of a command.

    Args:
        parser: with the command's arguments.
        arguments: of the command line.
        recipe: the path of the settings file that --recipe names.
        more_help: what --help prints in addition for the task of --task or of the settings; "" if there is none.

    Raises:
        ValueError: an argument or a setting is unknown or invalid.
        OSError: a file of settings can't be read.
    """
    rewriter = _Rewriter(_Names.of(parser), recipe)
    rewritten = rewriter.rewrite(list(arguments))
    if more_help is not None and any(argument in ("-h", "--help") for argument in rewritten):
        tasks = [argument.partition("=")[2] for argument in rewritten if argument.startswith("--task=")]
        text = more_help(tasks[-1] if tasks else str(rewriter.tree.get("task", "")))
        print(parser.format_help() + text, end="")
        raise SystemExit(0)
    # Not from the environment, whatever JSONARGPARSE_DEFAULT_ENV says.
    try:
        return parser.parse_args(rewritten, env=False)
    except ArgumentError as error:
        raise ValueError(readable(str(error))) from error


_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null",
          "dict": "a mapping", "list": "a list", "tuple": "a list"}  # fmt: skip


def readable(text: str) -> str:
    """A message of jsonargparse about a value of the wrong type, as a sentence; other messages stay."""
    text = re.sub(r'^Parser key "([^"]*)": ', r"\1: ", " ".join(text.split()))
    if match := re.match(r"(\S+): Expected an? <class '(\w+)'>\. Got value: ?(.*)$", text):
        name, kind, value = match.groups()
        return f"{name} is {value!r}; expected {_KINDS.get(kind, kind)}"
    if match := re.match(r"(\S+): .*Subtypes: \[(.*?)\] Errors: .* Given value: ?(.*)$", text):
        name, kinds, value = match.groups()
        literals = [word for group in re.findall(r"Literal\[(.*?)\]", kinds) for word in re.findall(r"'(.*?)'", group)]
        others = re.sub(r"typing\.Literal\[.*?\](, )?", "", kinds)
        named = [_KINDS.get(kind, kind) for kind in re.findall(r"<class '(\w+)'>", others)]
        generic = re.findall(r"(?<![\w'])(?:list|dict|tuple)\[[^\]]*\]", others)
        return f"{name} is {value!r}; expected {' or '.join([*literals, *generic, *named])}"
    return text


@dataclass
class _Names:
    """The options of a parser.

    Attributes:
        hints: dotted name -> type of the options with a value.
        groups: dotted names of the groups of settings.
        flags: the options without a value: help, print_config.
        positionals: whether there are positional arguments.
        has_config: whether there is an option --config.
    """

    hints: dict[str, Any] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    flags: set[str] = field(default_factory=set)
    positionals: bool = False
    has_config: bool = False

    @classmethod
    def of(cls, parser: ArgumentParser) -> _Names:
        names = cls()
        for action in parser._actions:
            if not action.option_strings:
                names.positionals = True
            elif action.dest == "config":
                names.has_config = True
            elif type(action).__name__ == "_ActionConfigLoad":
                names.groups.add(action.dest)
            elif action.dest == "print_config" or action.nargs == 0:
                names.flags.update(option[2:] for option in action.option_strings if option.startswith("--"))
            else:
                names.hints[action.dest] = getattr(action, "_typehint", action.type)
        return names

    @property
    def all(self) -> list[str]:
        """The names for messages."""
        return [*self.hints, *self.flags, *(_CONFIG if self.has_config else ())]

    def find(self, name: str) -> tuple[str, list[str]] | None:
        """The option of a name, and the keys that follow it: `options.pooling` is ("options", ["pooling"]).

        Raises:
            ValueError: several settings end with this name.
        """
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            start, keys = ".".join(parts[:length]).replace("-", "_"), parts[length:]
            ends = [start] if start in self.hints or (start in self.groups and not keys) else []
            ends = ends or [hint for hint in self.hints if hint.endswith("." + start)]
            ends = [end for end in ends if not keys or _takes_keys(self.hints[end])]
            if len(ends) > 1:
                raise ValueError(f"--{name} may be {' or '.join('--' + end for end in ends)}; give one of them in full")
            if ends:
                return ends[0], keys
        return None


def _takes_keys(hint: Any) -> bool:
    return any(getattr(kind, "__origin__", kind) is dict for kind in (hint, *_alternatives(hint)))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; () for another type."""
    is_union = getattr(hint, "__origin__", None) is Union or type(hint).__name__ == "UnionType"
    return get_args(hint) if is_union else ()


def _is_list(hint: Any) -> bool:
    return any(getattr(kind, "__origin__", kind) in (list, tuple) for kind in (hint, *_alternatives(hint)))


def _choices(hint: Any) -> tuple[Any, ...]:
    literals = [kind for kind in (hint, *_alternatives(hint)) if getattr(kind, "__origin__", None) is Literal]
    return tuple(choice for literal in literals for choice in get_args(literal))


@dataclass
class _Rewriter:
    names: _Names
    recipe: Callable[[str], str]
    tree: dict[str, Any] = field(default_factory=dict)  # the merged files
    output: list[str] = field(default_factory=list)

    def rewrite(self, arguments: list[str]) -> list[str]:
        positional: list[str] = []  # in one group at the end: argparse takes no other
        while arguments:
            argument = arguments.pop(0)
            if argument == "--":
                positional += [argument, *arguments]
                break
            if argument.startswith("--") and " " not in argument.partition("=")[0]:
                self._option(argument, arguments)
            else:
                positional.append(argument)
        self.output += positional
        if not self.tree:
            return self.output
        merged = yaml.safe_dump(_copy(self.tree), default_flow_style=True, sort_keys=False, width=float("inf"))
        return ["--config=" + merged, *self.output]

    def _option(self, argument: str, rest: list[str]) -> None:
        name, given, value = argument[2:].partition("=")
        appends = name.endswith("+")
        name = name.removesuffix("+")
        settings.refuse_classes(name.replace("-", "_"), "--")
        plain = name.replace("-", "_")
        if self.names.has_config and plain in _CONFIG:
            value = value if given else _value(rest)
            path = self.recipe(value) if plain == "recipe" else value
            if not path:
                raise ValueError("--config has no value; expected a YAML file")
            self._merge(settings.read_file(path), path)
            return
        if plain in self.names.flags or name in self.names.flags:
            self.output.append(f"--{plain if plain in self.names.flags else name}{given}{value}")
            return
        found = self.names.find(name)
        if found is None:
            negated = self.names.find(plain.removeprefix("no_")) if plain.startswith("no_") else None
            if negated is None or self.names.hints.get(negated[0]) is not bool or negated[1]:
                raise ValueError(f"unknown option --{name}{self._similar(plain)}; --help lists the options")
            if given:
                raise ValueError(f"--{name} has the value {value!r}; expected none")
            self.output.append(f"--{negated[0]}=false")
            return
        option, keys = found
        if option in self.names.groups:
            self._group(option, value if given else _value(rest))
            return
        values = [value] if given else self._values(option, keys, rest)
        self._add(option, keys, values, appends)

    def _similar(self, name: str) -> str:
        last = {option.rpartition(".")[2]: option for option in self.names.hints}
        if name == "learning_rate" and "lr" in last:
            return "; did you mean '--lr'?"
        similar = did_you_mean(name, [*self.names.all, *last])
        return similar.replace("did you mean '", "did you mean '--") if similar else ""

    def _values(self, option: str, keys: list[str], rest: list[str]) -> list[str]:
        """Take the values of an option from the arguments that follow it."""
        hint = self.names.hints[option]
        if hint is bool and not keys:
            words = _TRUE + _FALSE if not self.names.positionals else ("true", "false")
            if rest and rest[0].lower() in words:
                return [rest.pop(0)]
            if rest and not self.names.positionals and not _is_option(rest[0]):
                raise ValueError(f"--{option} is {rest[0]!r}; expected true or false")
            return ["true"]
        if not rest or _is_option(rest[0]):
            raise ValueError(f"--{option} has no value")
        values = [rest.pop(0)]
        # Without positional arguments a list extends to the next option. The type of what keys lead to is open.
        while (_is_list(hint) or keys) and not self.names.positionals and rest and not _is_option(rest[0]):
            values.append(rest.pop(0))
        return values

    def _add(self, option: str, keys: list[str], values: list[str], appends: bool) -> None:
        """Append `--option=value` to the output."""
        hint = self.names.hints[option]
        where = ".".join([option, *keys])
        if keys:
            inner = settings.hint_at(hint, keys, f"--{option}")
            value = values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False)
            self._check_nested(inner, value, f"--{where}")
            self.output.append(f"--{where}={value}")
            return
        value = values[0]
        if hint is bool:
            value = _boolean(option, value)
        elif (choices := _choices(hint)) and value not in map(str, choices) and not _accepts_other(hint, value):
            expected = ", ".join(map(str, choices))
            also = ", or a list" if _is_list(hint) else ""
            raise ValueError(f"--{option} is {value!r}; expected one of {expected}{also}{did_you_mean(value, choices)}")
        elif _is_list(hint):
            value = _list(hint, values)
        self._check_nested(hint, value, f"--{option}")
        before = any(argument.startswith((f"--{option}=", f"--{option}+=")) for argument in self.output)
        sign = "+" if appends and (before or self._in_tree(option)) else ""
        self.output.append(f"--{option}{sign}={value}")

    def _check_nested(self, hint: Any, value: str, where: str) -> None:
        if settings.has_dataclass(hint):
            try:
                loaded = settings.load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
            settings.check_nested(hint, loaded, where)

    def _in_tree(self, option: str) -> bool:
        values: Any = self.tree
        for part in option.split("."):
            values = values.get(part) if isinstance(values, dict) else None
        return values is not None

    def _group(self, group: str, value: str) -> None:
        """Merge the settings of a group, a mapping or a file."""
        is_mapping = value.lstrip().startswith("{")
        if not is_mapping and not Path(value).exists():
            raise ValueError(
                f"--{group} is {value!r}; expected a YAML file or a mapping; --{group}.NAME sets one of its settings"
            )
        values = settings.load(value) if is_mapping else settings.read_file(value)
        if self.names.has_config:
            self._merge({group: values}, f"--{group}")
            return
        for name, item in settings.mapping(values, f"--{group}").items():
            text = item if isinstance(item, str) else json.dumps(item)
            self._option(f"--{group}.{name}={text}", [])

    def _merge(self, values: dict[str, Any], where: str) -> None:
        """Merge the settings of a file into those of the files before it."""
        self._merge_into(self.tree, values, "", where)

    def _merge_into(self, tree: dict[str, Any], values: dict[str, Any], prefix: str, where: str) -> None:
        for name, value in values.items():
            first, _, others = name.removesuffix("+").partition(".")
            key = prefix + first
            if others:
                value = {name.partition(".")[2]: value}
                others = "" if _takes_keys(self.names.hints.get(key)) and "." not in others else others
            if key in self.names.groups:
                inner = settings.mapping(value, f"{where}: {key}")
                self._merge_into(tree.setdefault(first, {}), inner, f"{key}.", where)
            elif key not in self.names.hints or others:
                raise ValueError(f"{where}: unknown setting {prefix}{name}{self._similar_setting(prefix + name)}")
            else:
                settings.check_nested(self.names.hints[key], value, f"{where}: {key}")
                appended = name.endswith("+") and isinstance(tree.get(first), list)
                tree[first] = [*tree[first], *_as_list(value)] if appended else value
                if name.endswith("+") and not appended:
                    tree[first] = _as_list(value)

    def _similar_setting(self, name: str) -> str:
        last = {option.rpartition(".")[2]: option for option in self.names.hints}
        if name in last:
            return f"; did you mean {last[name]!r}?"
        return did_you_mean(name, [*self.names.hints, *self.names.groups])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _copy(values: Any) -> Any:
    """`values` without shared objects, which YAML would write as aliases."""
    if isinstance(values, dict):
        return {key: _copy(value) for key, value in values.items()}
    return [_copy(value) for value in values] if isinstance(values, list) else values


def _is_option(argument: str) -> bool:
    """Whether an argument is an option: it starts with a dash and is neither "-" nor a number."""
    if argument == "-" or not argument.startswith("-"):
        return False
    try:
        float(argument)
    except ValueError:
        return True
    return False


def _value(rest: list[str]) -> str:
    return rest.pop(0) if rest and not _is_option(rest[0]) else ""


def _boolean(option: str, value: str) -> str:
    if value.lower() in _TRUE:
        return "true"
    if value.lower() in _FALSE:
        return "false"
    raise ValueError(f"--{option} is {value!r}; expected true or false")


def _list(hint: Any, values: list[str]) -> str:
    """Several values, or one that is a list in YAML or separated by commas, as a list in YAML."""
    value = values[0]
    if len(values) == 1 and (value in map(str, _choices(hint)) or value in ("null", "None", "")):
        return value
    if len(values) == 1 and (value.strip()[:1], value.strip()[-1:]) in (("[", "]"), ("{", "}")):
        return value
    # The name of a file may have commas.
    parts = [part for value in values for part in ([value] if Path(value).exists() else value.split(","))]
    items = [item for kind in (hint, *_alternatives(hint)) for item in get_args(kind)]
    of_texts = any(str in (item, *_alternatives(item)) for item in items)
    return json.dumps(parts, ensure_ascii=False) if of_texts else f"[{', '.join(parts)}]"


def _accepts_other(hint: Any, value: str) -> bool:
    """Whether a union has another type than its choices that may take `value`: a list takes no single word."""
    others = [kind for kind in _alternatives(hint) if getattr(kind, "__origin__", None) is not Literal]
    if value in ("null", "None"):
        return type(None) in others
    return any(kind is not type(None) for kind in others) and not value.isidentifier()
