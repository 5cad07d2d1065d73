"""The targets of a device, as ratios of what one run measured: met, missed or not measured.

    python -m benchmarks.gpu.targets [FOLDER ...]      benchmarks/results/<device>; every device's where none is named

Reads the recorded benchmarks of a device and writes targets.json beside them. A missed target is a result and no
failure: the exit code is 0. Where ours has several implementations, the fastest is judged.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner.runner import at_least

RESULTS = Path(__file__).parents[1] / "results"
OURS = re.compile(r"bert_fast (?!.*with bias)")  # attention's peers add no bias
Row = dict[str, Any]


def of_copy(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
    """The share of the measured copy bandwidth that the floor's bytes move at."""
    return ours["share_of_ceiling"], "copy bandwidth"


def faster_than(peers: str) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """How many times faster than the fastest of the peers whose name matches."""

    def ratio(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
        timed = [row for row in rows if row["ms"] and re.match(peers, row["variant"])]
        if not timed:
            return None
        best = min(timed, key=lambda row: row["ms"])
        return best["ms"] / ours["ms"], best["variant"]

    return ratio


def of_rate(tokens_per_s: float) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """The share of so many real tokens a second."""
    return lambda ours, rows: (ours["tokens_per_s"] / tokens_per_s, f"{tokens_per_s:,.0f} real tokens/s")


def as_precise(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
    """How many times faster than the fastest peer of the same or a higher precision."""
    beside = [row for row in rows if at_least(row["precision"], ours["precision"])]
    return faster_than("(?!bert_fast)")(ours, beside)


def nearer_than(peer: str) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """How many times smaller the error is than that of the peer whose name matches."""

    def ratio(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
        found = next((row for row in rows if row["error"] and re.match(peer, row["variant"])), None)
        return found and (found["error"] / ours["error"], f"error of {found['variant']}")

    return ratio


@dataclass(frozen=True)
class Target:
    """`ratio` is to be at least `goal` in every case of `op` whose name matches, for ours whose name does.

    Where it is one device's target, `device` is in the name of its folder.
    """

    op: str
    cases: str
    goal: float
    ratio: Callable[[Row, list[Row]], tuple[float, str] | None]
    ours: re.Pattern[str] = OURS
    device: str = ""


TARGETS = (
    *(
        Target(op, rf".* bfloat16 {which}(, dropout)?", goal, of_copy)
        for op in ("add_layer_norm", "bias_gelu", "embedding_layer_norm")
        for which, goal in (("forward", 0.85), ("backward", 0.75))
    ),
    Target("attention", r"S 512 bfloat16 forward", 1.0, faster_than("SDPA ")),
    # A backend without dropout refuses the case, so that those which were timed have it.
    Target("attention", r"S 512 bfloat16 forward \+ backward, dropout", 1.5, faster_than("(?!bert_fast|copy of)")),
    Target("attention", r"S 512 half filled bfloat16 .*", 1.8, faster_than("SDPA |torch.compile")),
    Target("pretraining", r"(base|large) S \d+ train", 2.0, faster_than("transformers, torch.compile")),
    Target("pretraining", r"(base|large) S 512 half filled train", 3.5, faster_than("transformers, torch.compile")),
    Target("pretraining", r"large S .* train", 1.0, of_rate(200_000), device="h200"),
)
BASE = {  # case of BERT-base -> goals in fp32, bf16 and int8
    r"\(8, 128\) infer BERT-base": (1.1, 1.05, 1.4),
    r"\(2, 512\) infer BERT-base": (1.1, 1.05, 1.5),
    r"\(8, 512\) half filled infer BERT-base": (2.1, 2.2, 3.5),
    r"\(1, 32\) infer BERT-base": (1.0, 1.3, 1.8),
}
CPU_TARGETS = (
    *(
        Target("cpu_inference", case, goal, as_precise, re.compile(rf"bert_fast, {precision}"))
        for case, goals in BASE.items()
        for precision, goal in zip(("fp32", "bf16", "int8"), goals, strict=True)
    ),
    Target("cpu_inference", r".* infer .*", 1.0, nearer_than("ONNX Runtime, dynamic"), re.compile("bert_fast, int8")),
    *(
        Target(
            "cpu_inference",
            r".* infer .*",
            1.0,
            faster_than(rf"transformers, {precision}"),
            re.compile(f"bert_fast, {precision}"),
            device="avx2",
        )
        for precision in ("fp32", "bf16")
    ),
    *(
        Target(
            "cpu_training",
            rf"\(8, 128\) train BERT-base {precision}",
            goal,
            faster_than(rf"transformers, {precision}"),
            re.compile("bert_fast"),
        )
        for precision, goal in (("fp32", 3.0), ("bf16", 1.8))
    ),
)


def targets_of(device: str) -> tuple[Target, ...]:
    """The targets of a device, by the name of its folder."""
    return tuple(t for t in (CPU_TARGETS if device.startswith("cpu-") else TARGETS) if t.device in device)


def judge(target: Target, report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """An entry for each case of the target, at least one."""
    about = {"op": target.op, "goal": target.goal}
    if report is None:
        return [{**about, "case": target.cases, "result": "not measured", "reason": "the op has no report"}]
    about |= {name: report["environment"][name] for name in ("commit", "date")}
    cases: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if re.fullmatch(target.cases, row["case"]):
            cases.setdefault(row["case"], []).append(row)
    found: list[dict[str, Any]] = []
    for case, rows in cases.items():
        ours = min(
            (r for r in rows if r["ms"] and target.ours.match(r["variant"])), key=lambda r: r["ms"], default=None
        )
        ratio = target.ratio(ours, rows) if ours else None
        if ours is None or ratio is None:
            reason = "no peer could be timed" if ours else "no implementation of ours was timed"
            found.append({**about, "case": case, "result": "not measured", "reason": reason})
            continue
        verdict = "met" if ratio[0] >= target.goal else "missed"
        beside = {"variant": ours["variant"], "ratio": round(ratio[0], 3), "to": ratio[1]}
        found.append({**about, "case": case, "result": verdict, **beside})
    for case in report.get("left_out", []):
        if re.fullmatch(target.cases, case):
            found.append({**about, "case": case, "result": "not measured", "reason": "the time was over"})
    nothing = {**about, "case": target.cases, "result": "not measured", "reason": "the report has no such case"}
    return found or [nothing]


def judge_folder(folder: Path) -> list[dict[str, Any]]:
    """The entries of every target, from the reports in the folder of a device."""
    found = []
    for target in targets_of(folder.name):
        file = folder / f"{target.op}.json"
        found += judge(target, json.loads(file.read_text()) if file.exists() else None)
    return found


def table(entries: list[dict[str, Any]]) -> str:
    """The entries as a Markdown table."""
    lines = ["| op | case | goal | measured | of, or faster than | result |", "|---|---|---|---|---|---|"]
    for entry in entries:
        measured = f"{entry['ratio']:.2f} ({entry['variant']})" if "ratio" in entry else ""
        last = f"{entry['result']}: {entry['reason']}" if "reason" in entry else entry["result"]
        lines.append(
            f"| {entry['op']} | {entry['case']} | {entry['goal']:.2f} | {measured} | {entry.get('to', '')} | {last} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="the targets of a device, from its recorded benchmarks")
    parser.add_argument("folders", nargs="*", type=Path, help="results/<device>; every device's where none is named")
    named = parser.parse_args().folders
    folders = named or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    if all(folder.name.startswith("cpu-") for folder in folders):
        print("targets on a GPU: no benchmark is recorded; make gpu does it on a machine that has one")
    for folder in folders:
        entries = judge_folder(folder)
        (folder / "targets.json").write_text(json.dumps({"targets": entries}, indent=1) + "\n")
        counts = (
            f"{sum(e['result'] == result for e in entries)} {result}" for result in ("met", "missed", "not measured")
        )
        print(f"{table(entries)}\ntargets on {folder.name}: {', '.join(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
