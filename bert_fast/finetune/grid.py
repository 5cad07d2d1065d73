"""Grid search: fine-tuning runs for every combination of settings, over seeds and with k-fold cross-validation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bert_fast._config import did_you_mean, from_mapping
from bert_fast._io import check_fields, read_json, write_json
from bert_fast._lock import exclusive
from bert_fast.finetune.api import finetune
from bert_fast.finetune.config import FinetuneConfig
from bert_fast.finetune.report import METRICS, REPORT, SETTINGS, missing_package
from bert_fast.finetune.sweep_page import RESULT, read_sweep, settings_text, write_sweep_page
from bert_fast.finetune.task_run import MainMetric, main_metric
from bert_fast.finetune.unfinished import training_changes, unfinished_folder, unfinished_settings
from bert_fast.tasks.task import make_task

_WEIGHTS = "model.safetensors"


class Combination(NamedTuple):
    """A combination of the grid's settings, other than the seed, and its runs: one for each seed and fold."""

    settings: dict[str, Any]
    runs: list[FinetuneConfig]

    @property
    def folders(self) -> list[str]:
        """The names of the runs' folders."""
        return [Path(run.output_dir).name for run in self.runs]


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The Cartesian product of the values of `grid`; the last setting varies fastest.

    Raises:
        ValueError: the values of a setting are not a list, or empty.
    """
    lists: dict[str, list[Any]] = {}
    for name, values in grid.items():
        listed = values.tolist() if isinstance(values, np.ndarray) else values
        if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
            raise ValueError(f"grid: {name} is {values!r}; expected a list of values")
        lists[name] = [value.item() if isinstance(value, np.generic) else value for value in listed]
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def with_settings(config: FinetuneConfig, settings: Mapping[str, Any]) -> FinetuneConfig:
    """`config` with settings replaced by dotted names: {"optimizer.lr": 1e-4, "text.max_length": 64}.

    Raises:
        ValueError: a setting does not exist, or its value is out of range.
        TypeError: a value is of another type than the setting.
    """
    values = asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        mapping: Any = values
        for group in groups:
            mapping = mapping.get(group) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict) or (last not in mapping and groups != ["options"]):
            names = [
                f"{group}.{one}" for group, inner in asdict(config).items() if isinstance(inner, dict) for one in inner
            ]
            raise ValueError(
                f"grid: unknown setting {name}; expected one such as optimizer.lr, epochs or options.x"
                f"{did_you_mean(name, [*names, *values])}"
            )
        mapping[last] = value
    replaced: FinetuneConfig = from_mapping(FinetuneConfig, values)
    return replaced


def plan(config: FinetuneConfig, grid: Mapping[str, Sequence[Any]], folds: int) -> list[Combination]:
    """The runs of a sweep, in order.

    Raises:
        ValueError: a setting of the grid does not exist or is out of range.
    """
    seeds = [one["seed"] for one in combinations({"seed": grid["seed"]})] if "seed" in grid else [None]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"grid: seed is {seeds}; expected different seeds")
    planned = []
    others = {name: values for name, values in grid.items() if name != "seed"}
    for number, settings in enumerate(combinations(others), 1):
        runs = []
        for seed, fold in itertools.product(seeds, range(max(folds, 1))):
            name = f"{number:03d}"
            changes = dict(settings)
            if seed is not None:
                name, changes["seed"] = f"{name}-seed-{seed}", seed
            if folds:
                name, changes["data.folds"], changes["data.fold"] = f"{name}-fold-{fold + 1}", folds, fold
            runs.append(with_settings(config, {**changes, "output_dir": str(Path(config.output_dir) / name)}))
        planned.append(Combination(settings, runs))
    return planned


def sweep(
    config: FinetuneConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    folds: int = 0,
    keep: Literal["best", "all"] = "best",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tune with every combination of `grid` and rank the combinations by their metric on dev.

    `config.output_dir` gets one folder per run (`001`, `001-seed-0`, `001-fold-1`), as `finetune` writes it, sweep.json
    and report.html. A finished run with the same settings is reused, also one of an interrupted sweep with
    `config.overwrite`, and an interrupted run resumes: the same call goes on with an interrupted sweep.

    Args:
        config: the settings that all runs share.
        grid: dotted name of a setting -> its values; {} for one run. Seeds are runs of the same combination.
        folds: cross-validation with this many folds of data.train. 0 uses the split of `config.data`.
        keep: best removes the weights of all runs except those of the best combination; all keeps them.
        report: called with each message for the user.

    Returns:
        The content of sweep.json: `metric`; `folds`; `complete`; `overwrite`; `best`, the index of the best of `runs`;
        and `runs`, the combinations, a list of `settings`, `values` (of the metric on dev, one per run, None if
        undefined), `n`, `mean` and `std` of the values (the sample standard deviation: divisor n - 1, None for n = 1),
        `folders` and `rank`, 1 for the best by mean.

    Raises:
        ValueError: a setting of the grid does not exist or is out of range (before the first run); or a finished run
            has other settings.
        FileExistsError: the folder of a run exists, holds no finished run, and `config.overwrite` is False.
        OutputBusyError: another sweep is at work in `config.output_dir`.
        RunInterruptedError: a signal ended a run, whose state is saved.
    """
    target = Path(config.output_dir)
    planned = plan(config, grid, folds)
    with exclusive(target, what="sweep"):
        reusable = _finished_before(target) if config.overwrite else None
        metric = config.metric or make_task(config.task).main_metric
        done: dict[str, MainMetric] = {}
        total = sum(len(combination.runs) for combination in planned)
        for combination in planned:
            for run, folder in zip(combination.runs, combination.folders, strict=True):
                report(f"run {len(done) + 1} of {total}: {_described(combination, run)}")
                done[folder] = _run(run, reusable is None or folder in reusable, report)
                metric = done[folder].name
                result = _result(metric, folds, planned, done)
                result["overwrite"] = config.overwrite
                write_json(target / RESULT, result)
        if keep == "best":
            for number, combination in enumerate(planned):
                for folder in combination.folders if number != result["best"] else []:
                    (target / folder / _WEIGHTS).unlink(missing_ok=True)
        if config.report:
            _write_page(target, report)
    return result


def _described(combination: Combination, run: FinetuneConfig) -> str:
    seed = f", seed={run.seed}" if len({one.seed for one in combination.runs}) > 1 else ""
    fold = f", fold {run.data.fold + 1} of {run.data.folds}" if run.data.folds else ""
    return f"{settings_text(combination.settings)}{seed}{fold}"


def _finished_before(target: Path) -> set[str]:
    """The folders of the runs that an interrupted sweep in `target`, which overwrites too, has finished."""
    before = read_sweep(target) if (target / RESULT).is_file() else None
    if before is None or before["complete"] or not before["overwrite"]:
        return set()
    return {folder for run in before["runs"] for folder in run["folders"][: len(run["values"])]}


def _run(config: FinetuneConfig, reuse: bool, report: Callable[[str], None]) -> MainMetric:
    """The main metric on dev of a run, taken from its folder if it is finished, has the same settings and `reuse`."""
    folder = Path(config.output_dir)
    if reuse and (folder / METRICS).is_file():
        _check_same(folder, read_json(folder / SETTINGS), config)
        report(f"{folder} exists; its results are reused")
    else:
        before = unfinished_settings(folder)
        if before is not None:
            _check_same(unfinished_folder(folder), before, config)
        finetune(config, report=report)
    metrics = read_json(folder / METRICS, {"run": dict, "dev": dict})
    name = check_fields(metrics["run"], {"main_metric": str}, f"{folder / METRICS}: run")["main_metric"]
    return main_metric(make_task(config.task, config.options), name, metrics["dev"])


def _check_same(folder: Path, before: Mapping[str, Any], config: FinetuneConfig) -> None:
    if changed := training_changes(before, asdict(config)):
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"{folder} exists with other settings ({listed}); choose another output_dir, or give --overwrite true"
            + (f" and delete {folder}" if folder.suffix == ".unfinished" else "")
        )


def _result(metric: str, folds: int, planned: Sequence[Combination], done: Mapping[str, MainMetric]) -> dict[str, Any]:
    """The content of sweep.json after the runs in `done`; combinations are ranked when all are done."""
    runs: list[dict[str, Any]] = []
    scores: list[float] = []
    for combination in planned:
        finished = [done[folder] for folder in combination.folders if folder in done]
        values = [one.value for one in finished]
        defined = [value for value in values if value is not None]
        statistics: dict[str, Any] = {"n": len(values), "mean": None, "std": None}
        if values and len(defined) == len(values):
            statistics["mean"] = float(np.mean(defined))
            statistics["std"] = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
        runs.append(
            {
                "settings": combination.settings,
                "values": values,
                **statistics,
                "folders": combination.folders,
                "rank": 0,
            }
        )
        scores.append(float(np.mean([one.score for one in finished])) if finished else -np.inf)
    complete = len(done) == sum(len(combination.runs) for combination in planned)
    best = None
    if complete:
        order = sorted(range(len(runs)), key=lambda number: -scores[number])  # stable: ties keep their order
        for rank, number in enumerate(order, 1):
            runs[number]["rank"] = rank
        best = order[0]
    return {"metric": metric, "folds": folds, "complete": complete, "best": best, "runs": runs}


def _write_page(target: Path, report: Callable[[str], None]) -> None:
    """Write report.html; a failure is reported, and the results are kept."""
    if package := missing_package():
        report(f"{REPORT} is skipped: {package} is not installed; pip install 'bert_fast[finetune]'")
        return
    try:
        write_sweep_page(target)
    except Exception as error:
        report(f"warning: {REPORT} is not written: {type(error).__name__}: {error}")
