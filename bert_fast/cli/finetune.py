"""Fine-tune a pretrained model on a task: from rows to a model folder that transformers loads."""

from __future__ import annotations

import sys
from typing import Any

from bert_fast._config import from_mapping
from bert_fast.cli.standard import as_option
from bert_fast.finetune.config import FinetuneConfig

SHORT_NAMES = {"ner": "token-classification", "qa": "question-answering"}


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; --recipe NAME selects one included in bert_fast"
    )
    parser.add_class_arguments(FinetuneConfig)


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `finetune TASK ...` as `finetune --task TASK ...`: the task may also be set in the YAML file."""
    return as_option(arguments, "--task")


def more_help(task: str) -> str:
    """The options of a task, for --help; how to get them if `task` is empty."""
    if not task:
        return "\nbert-fast finetune TASK --help lists the options of a task too.\n"
    from jsonargparse import SUPPRESS, ArgumentParser

    from bert_fast.tasks.task import task_class

    parser = ArgumentParser(prog=f"bert-fast finetune {task}", usage=SUPPRESS, add_help=False)
    parser.add_class_arguments(task_class(SHORT_NAMES.get(task, task)).options_class, "options")
    listed = parser.format_help().strip()
    return f"\n{listed}\n" if "--options." in listed else f"\nThe task {task} has no options.\n"


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    values["task"] = SHORT_NAMES.get(values["task"], values["task"])
    config = from_mapping(FinetuneConfig, values)

    from bert_fast.cli.rows import print_metrics
    from bert_fast.finetune.api import finetune
    from bert_fast.finetune.unfinished import RunInterruptedError

    try:
        result = finetune(config, report=lambda text: print(text, file=sys.stderr))
    except RunInterruptedError as error:
        return interrupted(error)
    for split in ("dev", "test"):
        if split in result.metrics:
            print_metrics(result.metrics[split], f"{split} ")
            print()
    run = result.metrics["run"]
    print(f"{'steps':<22} {run['steps']}, best {run['best_step']}{', stopped early' if run['stopped_early'] else ''}")
    if run["tokens_per_second"]:
        print(f"{'tokens per second':<22} {run['tokens_per_second']:,.0f}")
    print(f"{'model':<22} {result.folder}")
    return 0


def interrupted(error: Any) -> int:
    """Say that a signal has ended a run and how it resumes; returns the exit code."""
    print(f"stopped by signal {error.signal} after step {error.step} of {error.total_steps}; saved")
    print(f"checkpoint: {error.checkpoint} (the same command resumes from it)")
    return 128 + int(error.signal)
