"""One run of `bert-fast bench`: its suites one after the other, the table, the files, and the exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_fast._io import write_json, write_text
from bert_fast.bench import page, runner
from bert_fast.bench.devices import Machine, machine_of
from bert_fast.kernels._common.benchmarks import Plan

Report = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """The benchmarks of one op or model.

    Args:
        op: its name in the rows.
        plans: the cases.
        recorded: called with the report whenever `--record` has written it.
        about: further fields of the environment.
    """

    op: str
    plans: Sequence[Plan]
    recorded: Callable[[Report], None] = lambda report: None
    about: Mapping[str, Any] = field(default_factory=dict)


def start(device: str | None) -> Machine:
    """The device; PyTorch is set up for benchmarks with compiled peers.

    Raises:
        ValueError: there is no such device.
    """
    runner.set_up()
    return machine_of(device)


def run(suites: Mapping[str, Suite], machine: Machine, args: Any, *, warm: bool = False) -> int:
    """Measure the suites and write what `args` asks for; 1 if one of ours failed.

    Args:
        suites: by the name of the file that `--record` writes.
        args: the options of `bert_fast.cli.bench_kernels.add_common_arguments`.
        warm: compare only.
    """
    begin = time.perf_counter()
    budget = float("inf") if args.budget is None else args.budget
    seconds = args.seconds or runner.seconds_a_case(machine, args.quick)
    results = runner.RESULTS if args.results is None else Path(args.results)
    if args.record and args.results is None and not results.is_dir():
        raise ValueError(f"--record writes to {results}, which only a checkout has; expected --results FOLDER")
    reports: dict[str, Report] = {}
    failed: list[str] = []
    with machine.active():
        limits = None if warm else machine.ceilings()
        for name, suite in suites.items():
            if limits is None:
                failed += runner.warm(suite.plans, machine)
                continue

            def save(report: Report, name: str = name, suite: Suite = suite) -> None:
                report["environment"] |= suite.about
                reports[name] = report
                if args.record:
                    write_json(runner.file_of(report, name, results), report)
                    suite.recorded(report)
                if args.output:
                    write_json(Path(args.output), merged(list(reports.values())))

            left = budget - (time.perf_counter() - begin)
            save(runner.run(suite.op, suite.plans, machine, seconds, left, save, limits))
    for name, report in reports.items():
        failed += report.get("failures", [])
        if args.record:
            print(f"written: {runner.file_of(report, name, results)}")
    if args.output and reports:
        print(f"written: {args.output}")
    if args.html and reports:
        write_text(Path(args.html), page.of_report(merged(list(reports.values()))))
        print(f"written: {args.html}")
    return runner.exit_code(failed)


def merged(reports: Sequence[Report]) -> Report:
    """Reports of one run as one: the environment is that of the last, whose load is that of the whole run."""
    lists = {
        name: [item for report in reports for item in report.get(name, [])] for name in ("rows", "left_out", "failures")
    }
    return {**reports[-1], **{name: items for name, items in lists.items() if items or name == "rows"}}
