"""The targets of a device, as ratios of figures from one run: met, missed or not measured.

    python -m benchmarks.gpu.targets [FOLDER ...]      folders benchmarks/results/<device>; without one, all of them

Reads the recorded benchmarks of a device and writes targets.json next to them. A missed target is a result, not a
failure: the exit code is 0. Of our implementations the fastest is judged.
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

from bert_fast._io import write_json
from bert_fast.bench.runner import OURS as OUR_NAME
from bert_fast.bench.runner import RESULTS, YARDSTICK, at_least
from bert_fast.kernels._common.dispatch import IMPLS

OURS = re.compile(rf"{OUR_NAME} (?!fuse|.*with bias)")  # fuse gets padded batches; attention's peers add no bias
Row = dict[str, Any]


def of_copy(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
    """The time of a plain copy of the minimal traffic, interleaved with ours, over ours: launches weigh on both."""
    copy = next((row for row in rows if row["variant"] == YARDSTICK and row["ms"]), None)
    return copy and (copy["ms"] / ours["ms"], YARDSTICK)


def faster_than(peers: str) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """The speedup over the fastest peer whose name matches."""

    def ratio(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
        timed = [row for row in rows if row["ms"] and re.match(peers, row["variant"])]
        if not timed:
            return None
        best = min(timed, key=lambda row: row["ms"])
        return best["ms"] / ours["ms"], best["variant"]

    return ratio


def of_rate(tokens_per_s: float) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """The rate of real tokens over `tokens_per_s`."""
    return lambda ours, rows: (ours["tokens_per_s"] / tokens_per_s, f"{tokens_per_s:,.0f} real tokens/s")


def as_precise(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
    """The speedup over the fastest peer of the same or a higher precision."""
    rivals = [row for row in rows if at_least(row["precision"], ours["precision"])]
    return faster_than("(?!bert_fast)")(ours, rivals)


def nearer_than(peer: str) -> Callable[[Row, list[Row]], tuple[float, str] | None]:
    """The error of the peer whose name matches over ours."""

    def ratio(ours: Row, rows: list[Row]) -> tuple[float, str] | None:
        row = next((row for row in rows if row["error"] and re.match(peer, row["variant"])), None)
        return row and (row["error"] / ours["error"], f"error of {row['variant']}")

    return ratio


@dataclass(frozen=True)
class Target:
    """`ratio` must be at least `goal` in every case of `op` whose name matches `cases`.

    Args:
        op, cases: name of the report, and a pattern for the names of its cases.
        goal: the least ratio.
        ratio: (row of ours, all rows of the case) -> the ratio and what it refers to, or None without a peer.
        ours: a pattern for the names of the variants that are judged.
        device: part of the name of the device's folder, for a target of some devices only.
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
    # A backend without dropout refuses the case, so every timed peer has it.
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
    """The targets of the device with this folder name."""
    return tuple(t for t in (CPU_TARGETS if device.startswith("cpu-") else TARGETS) if t.device in device)


def judge(target: Target, report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One entry per case of the target, at least one."""
    about = {"op": target.op, "goal": target.goal}
    if report is None:
        return [{**about, "case": target.cases, "result": "not measured", "reason": "no report"}]
    about |= {name: report["environment"][name] for name in ("commit", "date")}
    cases: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if re.fullmatch(target.cases, row["case"]):
            cases.setdefault(row["case"], []).append(row)
    entries: list[dict[str, Any]] = []
    for case, rows in cases.items():
        ours = min(
            (r for r in rows if r["ms"] and target.ours.match(r["variant"])), key=lambda r: r["ms"], default=None
        )
        ratio = target.ratio(ours, rows) if ours else None
        if ours is None or ratio is None:
            reason = "no peer was timed" if ours else "no implementation of ours was timed"
            entries.append({**about, "case": case, "result": "not measured", "reason": reason})
            continue
        verdict = "met" if ratio[0] >= target.goal else "missed"
        figures = {"variant": ours["variant"], "ratio": round(ratio[0], 3), "to": ratio[1]}
        entries.append({**about, "case": case, "result": verdict, **figures})
    for case in report.get("left_out", []):
        if re.fullmatch(target.cases, case):
            entries.append({**about, "case": case, "result": "not measured", "reason": "out of time"})
    missing = {**about, "case": target.cases, "result": "not measured", "reason": "the report has no such case"}
    return entries or [missing]


def judge_folder(folder: Path) -> list[dict[str, Any]]:
    """The entries of every target, from the reports in a device's folder."""
    return [entry for target in targets_of(folder.name) for entry in judge(target, report_of(folder, target.op))]


def report_of(folder: Path, op: str) -> dict[str, Any] | None:
    """The report of an op; the rows of several where implementations were timed in processes of their own."""
    names = (op, *(f"{op}_{impl}" for impl in IMPLS))
    files = [file for name in names if (file := folder / f"{name}.json").exists()]
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not reports:
        return None
    merged = {name: [entry for report in reports for entry in report.get(name, [])] for name in ("rows", "left_out")}
    timed = {row["case"] for row in merged["rows"]}
    left_out = [case for case in dict.fromkeys(merged["left_out"]) if case not in timed]
    return {**reports[0], "rows": merged["rows"], "left_out": left_out}


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
    parser.add_argument("folders", nargs="*", type=Path, help="results/<device>; all of them if none is named")
    folders = parser.parse_args().folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    if all(folder.name.startswith("cpu-") for folder in folders):
        print("targets on a GPU: no benchmark is recorded; run make gpu-bench on a machine with a CUDA device")
    for folder in folders:
        entries = judge_folder(folder)
        write_json(folder / "targets.json", {"targets": entries})
        counts = (
            f"{sum(e['result'] == result for e in entries)} {result}" for result in ("met", "missed", "not measured")
        )
        print(f"{table(entries)}\ntargets on {folder.name}: {', '.join(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
