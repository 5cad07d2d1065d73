"""Grid search: a fine-tuning run per combination of settings, on one split or with k-fold cross-validation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bert_fast._config import from_mapping
from bert_fast._io import write_json
from bert_fast.finetune.api import finetune
from bert_fast.finetune.config import FinetuneConfig
from bert_fast.finetune.report import METRICS, SETTINGS
from bert_fast.finetune.task_run import MainMetric, main_metric
from bert_fast.tasks.task import make_task

RESULT = "sweep.json"
_WEIGHTS = "model.safetensors"


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The Cartesian product of the values of `grid`; the last setting varies fastest.

    Raises:
        ValueError: the values of a setting are not a list, or empty.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid: {name} is {values!r}; expected a list of values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_settings(config: FinetuneConfig, settings: Mapping[str, Any]) -> FinetuneConfig:
    """`config` with settings replaced by dotted names: {"optimizer.lr": 1e-4, "text.max_length": 64}.

    Raises:
        ValueError: a setting does not exist, or its value is out of range.
    """
    values = asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        mapping: Any = values
        for group in groups:
            mapping = mapping.get(group) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict) or (last not in mapping and groups != ["options"]):
            raise ValueError(f"grid: unknown setting {name}; expected one such as optimizer.lr, epochs or options.x")
        mapping[last] = value
    replaced: FinetuneConfig = from_mapping(FinetuneConfig, values)
    return replaced


def sweep(
    config: FinetuneConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    folds: int = 0,
    keep: Literal["best", "all"] = "best",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune with every combination of `grid` and rank the combinations by their metric on dev.

    `config.output_dir` gets one folder per run (`001`, or `001-fold-1`), as `finetune` writes it, and sweep.json. A
    finished run with the same settings is reused: an interrupted sweep resumes.

    Args:
        config: the settings that all runs share.
        grid: dotted name of a setting -> its values; {} for one run.
        folds: cross-validation with this many folds of data.train; a combination is ranked by its mean. 0 uses the
            split of `config.data`.
        keep: best removes the weights of all runs except those of the best combination; all keeps them.
        report: called with each message for the user.

    Returns:
        The content of sweep.json: `metric`; `folds`; `runs`, a list of `settings`, `values` (of the metric on dev, one
        per fold, None if undefined), `mean`, `std`, `folders` and `rank`, 1 for the best; and `best`, its index.

    Raises:
        ValueError: a setting of the grid does not exist or is out of range (before the first run); or a finished run
            has other settings.
        FileExistsError: the folder of a run exists, holds no finished run, and `config.overwrite` is False.
    """
    target = Path(config.output_dir)
    planned = []
    for number, settings in enumerate(combinations(grid), 1):
        configs = []
        for fold in range(max(folds, 1)):
            name = f"{number:03d}-fold-{fold + 1}" if folds else f"{number:03d}"
            split = {"data.folds": folds, "data.fold": fold} if folds else {}
            configs.append(with_settings(config, {**settings, **split, "output_dir": str(target / name)}))
        planned.append((settings, configs))
    runs: list[dict[str, Any]] = []
    scores: list[float] = []
    total = len(planned) * max(folds, 1)
    metric = config.metric or make_task(config.task).main_metric
    for settings, configs in planned:
        values: list[float | None] = []
        fold_scores: list[float] = []
        for run in configs:
            report(f"run {len(runs) * max(folds, 1) + len(values) + 1} of {total}: {settings_text(settings)}")
            metric, value, score = _run(run, report)
            values.append(value)
            fold_scores.append(score)
        defined = [value for value in values if value is not None]
        mean, std = (float(np.mean(defined)), float(np.std(defined))) if len(defined) == len(values) else (None, None)
        folders = [Path(run.output_dir).name for run in configs]
        runs.append({"settings": settings, "values": values, "mean": mean, "std": std, "folders": folders})
        scores.append(float(np.mean(fold_scores)))
    order = sorted(range(len(runs)), key=lambda number: -scores[number])  # stable: ties keep their order
    for rank, number in enumerate(order, 1):
        runs[number]["rank"] = rank
    best = order[0]
    if keep == "best":
        for number, finished in enumerate(runs):
            for folder in finished["folders"] if number != best else []:
                (target / folder / _WEIGHTS).unlink(missing_ok=True)
    result = {"metric": metric, "folds": folds, "best": best, "runs": runs}
    write_json(target / RESULT, result)
    return result


def _run(config: FinetuneConfig, report: Callable[[str], None]) -> MainMetric:
    """The main metric on dev of a run, taken from its folder if it is finished and has the same settings."""
    folder = Path(config.output_dir)
    if (folder / METRICS).is_file() and not config.overwrite:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if before != json.loads(json.dumps(asdict(config), default=str)):
            raise ValueError(
                f"{folder} exists with other settings; choose another output_dir, or give --overwrite true"
            )
        report(f"{folder} exists; its results are reused")
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    else:
        metrics = finetune(config, report=report).metrics
    return main_metric(make_task(config.task, config.options), metrics["run"]["main_metric"], metrics["dev"])


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as on the command line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "default settings"


def ranked(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of a result, best first."""
    return sorted(result["runs"], key=lambda run: run["rank"])
