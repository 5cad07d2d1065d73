"""Convert text to a vocabulary and tokenised shards; by default the prose of this Python installation."""

from __future__ import annotations

from typing import Any

from bert_fast.data import PrepareConfig, prepare


def add_arguments(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file; --recipe NAME uses one of bert_fast")
    parser.add_class_arguments(PrepareConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    prepare(PrepareConfig(**values))
    return 0
