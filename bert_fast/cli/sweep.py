"""Fine-tune with every combination of a grid of settings, optionally with cross-validation, and rank the results.

Accepts all settings of `bert-fast finetune`, and --grid '{"optimizer.lr": [2e-5, 5e-5], "seed": [0, 1]}', or the same
under `grid:` in the file of --config.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from bert_fast._config import from_mapping
from bert_fast.cli.finetune import SHORT_NAMES, interrupted
from bert_fast.cli.finetune import more_help as more_help
from bert_fast.cli.finetune import positional as positional
from bert_fast.finetune.config import FinetuneConfig


def add_arguments(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_argument("--grid", type=dict[str, list[Any]], default={}, help="dotted setting: list of values")
    parser.add_argument("--folds", type=int, default=0, help="cross-validation with this many folds of data.train")
    parser.add_argument(
        "--keep",
        type=Literal["best", "all"],
        default="best",
        help="keep the weights of the best combination, or of all runs",
    )
    parser.add_class_arguments(FinetuneConfig)


def run(args: Any) -> int:
    values = dict(vars(args))
    values.pop("config", None)
    grid, folds, keep = (values.pop(name) for name in ("grid", "folds", "keep"))
    values["task"] = SHORT_NAMES.get(values["task"], values["task"])
    config = from_mapping(FinetuneConfig, values)

    from bert_fast.finetune.grid import sweep
    from bert_fast.finetune.sweep_page import ranked, settings_text
    from bert_fast.finetune.unfinished import RunInterruptedError

    try:
        result = sweep(config, grid, folds=folds, keep=keep, report=lambda text: print(text, file=sys.stderr))
    except RunInterruptedError as error:
        return interrupted(error)
    several = any(run["n"] > 1 for run in result["runs"])
    print(f"dev {result['metric']}{', mean ± sample standard deviation of the n runs' if several else ''}")
    for run in ranked(result):
        mean = "undefined" if run["mean"] is None else f"{run['mean']:.4f}"
        deviation = f" ± {run['std']:.4f} (n = {run['n']})" if run["std"] is not None else ""
        print(f"{mean}{deviation}  {run['folders'][0]}  {settings_text(run['settings'])}")
    print(f"{config.output_dir}/sweep.json")
    return 0
