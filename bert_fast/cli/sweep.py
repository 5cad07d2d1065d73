"""Fine-tune with every combination of a grid of settings, each on k folds if wanted, and say which is best.

Takes all settings of `bert-fast finetune`, and --grid '{"optimizer.lr": [2e-5, 5e-5], "seed": [0, 1]}', or the same
under `grid:` in the file that --config names.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from bert_fast._config import from_mapping
from bert_fast.cli.finetune import positional as positional
from bert_fast.finetune.config import FinetuneConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_argument("--grid", type=dict[str, list[Any]], default={}, help="setting: list of its values")
    parser.add_argument("--folds", type=int, default=0, help="cross-validation over so many parts of data.train")
    parser.add_argument("--keep", type=Literal["best", "all"], default="best", help="whose weights stay")
    parser.add_class_arguments(FinetuneConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    grid, folds, keep = (values.pop(name) for name in ("grid", "folds", "keep"))
    config = from_mapping(FinetuneConfig, values)

    from bert_fast.finetune.sweep import ranked, said, sweep

    result = sweep(config, grid, folds=folds, keep=keep, report=lambda text: print(text, file=sys.stderr))
    print(f"dev {result['metric']}{f', mean and deviation of {folds} folds' if folds else ''}")
    for one in ranked(result):
        mean = "not defined" if one["mean"] is None else f"{one['mean']:.4f}"
        deviation = f" ± {one['std']:.4f}" if folds and one["std"] is not None else ""
        print(f"{mean}{deviation}  {one['folders'][0]}  {said(one['settings'])}")
    print(f"{config.output_dir}/sweep.json")
    return 0
