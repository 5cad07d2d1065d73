"""Fine-tune one encoder on several tasks at once: a YAML file in, a model folder a task out.

The file names the tasks under `tasks:`, each with what `bert-fast finetune` is told about a task (task, data, options,
text, augment, loss, metric) and, if wanted, rows and weight; what is common stands beside.
"""

from __future__ import annotations

import sys
from typing import Any

from bert_fast._config import from_mapping
from bert_fast.finetune.multitask_config import MultitaskConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file; --recipe NAME takes one that comes with bert_fast"
    )
    parser.add_class_arguments(MultitaskConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    config = from_mapping(MultitaskConfig, values)

    from bert_fast.cli.rows import print_metrics
    from bert_fast.finetune.multitask import multitask

    result = multitask(config, report=lambda text: print(text, file=sys.stderr))
    for name, own in result.tasks.items():
        for split in ("dev", "test"):
            if split in own.metrics:
                print(f"{name}, {split}")
                print_metrics(own.metrics[split])
                print()
    run = result.metrics["run"]
    mean = result.metrics["mean"]
    print(f"{'mean of the metrics':<22} {'not defined' if mean is None else f'{mean:.4f}'}")
    print(f"{'steps':<22} {run['steps']}, best {run['best_step']}{', stopped early' if run['stopped_early'] else ''}")
    print(f"{'models':<22} {', '.join(own.folder for own in result.tasks.values())}")
    return 0
