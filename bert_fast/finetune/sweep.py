"""Many fine-tuning runs: each combination of a grid of settings, on one split or on k folds, and the best."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bert_fast._config import from_mapping
from bert_fast.finetune.api import finetune
from bert_fast.finetune.config import FinetuneConfig
from bert_fast.finetune.files import write_json
from bert_fast.finetune.report import METRICS, SETTINGS
from bert_fast.finetune.task_run import score
from bert_fast.tasks.task import make_task

RESULT = "sweep.json"
_WEIGHTS = "model.safetensors"


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value for each setting of `grid`; the last setting changes fastest.

    Raises:
        ValueError: a setting has no list of values.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid: {name} is {values!r}; expected a list of values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_settings(config: FinetuneConfig, settings: Mapping[str, Any]) -> FinetuneConfig:
    """`config` with the settings of dotted names replaced: {"optimizer.lr": 1e-4, "text.max_length": 64}.

    Raises:
        ValueError: there is no such setting, or the value is out of its range.
    """
    values = asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        place: Any = values
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (last not in place and groups != ["options"]):
            raise ValueError(
                f"grid: there is no setting {name}; expected one such as optimizer.lr, epochs or options.x"
            )
        place[last] = value
    found: FinetuneConfig = from_mapping(FinetuneConfig, values)
    return found


def sweep(
    config: FinetuneConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    folds: int = 0,
    keep: Literal["best", "all"] = "best",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune with every combination of `grid`, and compare what they reach on dev.

    `config.output_dir` gets a folder for each run (`001`, or `001-fold-1`) as `finetune` writes it, and sweep.json.
    A run that is there already, with the same settings, is not done again: a sweep that was cut off goes on.

    Args:
        config: what all runs have in common.
        grid: dotted name of a setting -> its values; {} for one run.
        folds: cross-validation: each combination is run on so many splits of data.train, and counts by its mean; 0 for
            the one split that `config.data` says.
        keep: best removes the weights of all runs but those of the best combination.
        report: takes the sentences that a user should read.

    Returns:
        The content of sweep.json: `metric`; `runs`, a list with `settings`, `values` (of the metric on dev, one a fold,
        None where it is not defined), `mean`, `std`, `folders` and `rank`, 1 for the best; and `best`, its index.

    Raises:
        ValueError: a setting of the grid does not exist or is out of range: before the first run.
    """
    target = Path(config.output_dir)
    planned = []
    for number, settings in enumerate(combinations(grid), 1):
        one = []
        for fold in range(max(folds, 1)):
            name = f"{number:03d}-fold-{fold + 1}" if folds else f"{number:03d}"
            split = {"data.folds": folds, "data.fold": fold} if folds else {}
            one.append(with_settings(config, {**settings, **split, "output_dir": str(target / name)}))
        planned.append((settings, one))
    runs: list[dict[str, Any]] = []
    scores: list[float] = []
    total = len(planned) * max(folds, 1)
    metric = config.metric or make_task(config.task).main_metric
    for settings, configs in planned:
        values: list[float | None] = []
        worths: list[float] = []
        for run in configs:
            report(f"run {len(runs) * max(folds, 1) + len(values) + 1} of {total}: {said(settings)}")
            metric, value, worth = _run(run, report)
            values.append(value)
            worths.append(worth)
        known = [value for value in values if value is not None]
        mean, std = (float(np.mean(known)), float(np.std(known))) if len(known) == len(values) else (None, None)
        folders = [Path(run.output_dir).name for run in configs]
        runs.append({"settings": settings, "values": values, "mean": mean, "std": std, "folders": folders})
        scores.append(float(np.mean(worths)))
    order = sorted(range(len(runs)), key=lambda number: -scores[number])  # of equal ones the first
    for rank, number in enumerate(order, 1):
        runs[number]["rank"] = rank
    best = order[0]
    if keep == "best":
        for number, done in enumerate(runs):
            for folder in done["folders"] if number != best else []:
                (target / folder / _WEIGHTS).unlink(missing_ok=True)
    result = {"metric": metric, "folds": folds, "best": best, "runs": runs}
    write_json(target / RESULT, result)
    return result


def _run(config: FinetuneConfig, report: Callable[[str], None]) -> tuple[str, float | None, float]:
    """The metric that counts, on dev, of a run that is done now, or was before with the same settings."""
    folder = Path(config.output_dir)
    if (folder / METRICS).is_file() and not config.overwrite:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if before != json.loads(json.dumps(asdict(config), default=str)):
            raise ValueError(f"{folder} is there, with other settings; choose another output_dir, or --overwrite true")
        report(f"{folder} is there already")
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    else:
        if folder.exists():
            shutil.rmtree(folder)
        metrics = finetune(config, report=report).metrics
    return score(make_task(config.task, config.options), metrics["run"]["main_metric"], metrics["dev"])


def said(settings: Mapping[str, Any]) -> str:
    """Settings as a user would give them."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the settings as they are"


def ranked(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of a result, the best first."""
    return sorted(result["runs"], key=lambda run: run["rank"])
