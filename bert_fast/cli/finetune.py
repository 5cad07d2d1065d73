"""Fine-tune a pretrained model on a task: from rows to a model folder that transformers loads."""

from __future__ import annotations

import sys
from typing import Any

from bert_fast._config import from_mapping
from bert_fast.finetune.config import FinetuneConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; --recipe NAME selects one included in bert_fast"
    )
    parser.add_class_arguments(FinetuneConfig)


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `finetune TASK ...` as `finetune --task TASK ...`: the task may also be set in the YAML file."""
    if arguments and not arguments[0].startswith("-"):
        return ["--task", *arguments]
    return arguments


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
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
