"""Fine-tune one encoder on several tasks: from a YAML file to one model folder per task.

The file lists the tasks under `tasks:`, each with the settings that `bert-fast finetune` has for a task (task, data,
options, text, augment, loss, metric) and optionally rows and weight; shared settings are at the top level.
"""

from __future__ import annotations

import sys
from typing import Any

from bert_fast._config import from_mapping
from bert_fast.cli.finetune import interrupted
from bert_fast.finetune.config import MultitaskConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; --recipe NAME selects one included in bert_fast"
    )
    parser.add_class_arguments(MultitaskConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    config = from_mapping(MultitaskConfig, values)

    from bert_fast.cli.rows import print_metrics
    from bert_fast.finetune.api import multitask
    from bert_fast.finetune.unfinished import RunInterruptedError

    try:
        result = multitask(config, report=lambda text: print(text, file=sys.stderr))
    except RunInterruptedError as error:
        return interrupted(error)
    for name, task_result in result.tasks.items():
        for split in ("dev", "test"):
            if split in task_result.metrics:
                print(f"{name}, {split}")
                print_metrics(task_result.metrics[split])
                print()
    run = result.metrics["run"]
    mean = result.metrics["mean"]
    print(f"{'mean of the metrics':<22} {'undefined' if mean is None else f'{mean:.4f}'}")
    print(f"{'steps':<22} {run['steps']}, best {run['best_step']}{', stopped early' if run['stopped_early'] else ''}")
    print(f"{'models':<22} {', '.join(task_result.folder for task_result in result.tasks.values())}")
    return 0
