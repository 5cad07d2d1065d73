"""`python -m tests.torture`: run the attacks, print what was tried and what held; exit code 1 if something did not.

--seconds 780   time for all of them on this machine; every attack runs at least one case
--seed N        what is drawn; by default the date, so that days differ
--area A --attack NAME --isa ISA    some of them
--only N        the case of that number, as a failure names it (with --area, --attack, --isa and --seed)
--quick         the fixed cases of `make test`
--record        write docs/torture.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.torture.attack import announce, run_attack, temporary_folder

ROOT = Path(__file__).resolve().parents[2]
# Areas, the module of each, and its share of the time (of the kernels': for each instruction set).
AREAS = {"kernels": 2.0, "models": 2.0, "files": 3.0, "kills": 4.0, "hostile": 2.0}
PER_ISA = ("kernels", "models")
STARTUP = 40  # seconds to import, and to build what the files of the attacks are made of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=780.0)
    parser.add_argument("--seed", type=int, default=int(time.strftime("%Y%m%d")))
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--attack")
    parser.add_argument("--isa")
    parser.add_argument("--only", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json is not None:
        return run_here(arguments)
    if arguments.quick:
        arguments.seed = 0
    begin = time.monotonic()
    with temporary_folder() as folder:
        rows = run_all(arguments, folder)
    table = as_table(rows)
    print(table)
    failures = [(row, text) for row in rows for text in row["failures"].values()]
    for row, text in failures:
        place = ", ".join(filter(None, (row["area"], row["attack"], row["isa"])))
        again = command(row, arguments.seed, text.split(":")[0].removeprefix("case "))
        print(f"\n{place}: {text}\n  {again}")
    seconds = time.monotonic() - begin
    tried, held = (sum(row[key] for row in rows) for key in ("tried", "held"))
    print(f"\n{tried:,} cases, {held:,} held, {seconds:.0f} s, seed {arguments.seed}")
    if arguments.record:
        record(table, arguments.seed, seconds)
    return 1 if failures or not rows else 0


def command(row: dict[str, Any], seed: int, number: str) -> str:
    """The command that runs one case again."""
    words = ["python", "-m", "tests.torture", "--area", row["area"], "--attack", row["attack"]]
    words += ["--isa", row["isa"]] if row["isa"] else []
    return shlex.join([*words, "--seed", str(seed), "--only", number])


def run_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run each area, and each instruction set of the kernels, in a process; `jobs` of them at a time."""
    areas = [arguments.area] if arguments.area else list(AREAS)
    material = folder / "material"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BERT_FAST_CUDA_EMULATOR": "",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder / "cache"),
    }
    code = f"from tests.torture.material import build; build({str(material)!r}, {areas!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    if set(areas) & {"files", "kills", "hostile"}:
        code = f"from tests.torture.kills import run_uninterrupted as run; run({str(material)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    code = "from tests.torture.kernels import instruction_sets as f; print(*f())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    isas = [arguments.isa] if arguments.isa else found.stdout.split()
    if arguments.quick:
        isas = isas[-1:]
    jobs = [(area, isa) for area in areas for isa in (isas if area in PER_ISA else [""])]
    total = sum(AREAS[area] / (len(isas) if area in PER_ISA else 1) for area, _ in jobs)
    available = (arguments.seconds - STARTUP) * arguments.jobs - 6 * len(jobs)
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    rows: list[dict[str, Any]] = []
    # The longest first, so that the processors end together.
    jobs.sort(key=lambda job: -AREAS[job[0]] / (len(isas) if job[0] in PER_ISA else 1))
    while jobs or running:
        while jobs and len(running) < arguments.jobs:
            area, isa = jobs.pop(0)
            share = AREAS[area] / (len(isas) if area in PER_ISA else 1) / total
            output = folder / f"{area}-{isa}.json"
            words = [sys.executable, "-m", "tests.torture", "--area", area, "--seed", str(arguments.seed)]
            words += ["--json", str(output), "--material", str(material), "--seconds", str(max(1.0, available * share))]
            words += ["--attack", arguments.attack] if arguments.attack else []
            words += ["--only", str(arguments.only)] if arguments.only is not None else []
            words += ["--quick"] if arguments.quick else []
            words += ["--isa", isa] if isa else []
            isa_only = {"BERT_FAST_CPU_ISA": isa} if isa else {}
            running.append((subprocess.Popen(words, cwd=ROOT, env={**environment, **isa_only}), output))
        time.sleep(0.1)
        for process, output in [pair for pair in running if pair[0].poll() is not None]:
            if process.returncode:
                raise SystemExit(f"the process of {output.stem} ended with exit code {process.returncode}")
            rows += json.loads(output.read_text())
            running.remove((process, output))
    order = list(AREAS)
    return sorted(rows, key=lambda row: (order.index(row["area"]), row["attack"]))


def run_here(arguments: argparse.Namespace) -> int:
    """Run the attacks of one area in this process's forks and write their rows to --json."""
    import torch

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    attacks = importlib.import_module(f"tests.torture.{arguments.area}").ATTACKS
    attacks = [attack for attack in attacks if arguments.attack in (None, attack.name)]
    if not attacks:
        raise SystemExit(f"--attack is {arguments.attack!r}, which the area {arguments.area} does not have")
    total = sum(attack.share for attack in attacks)
    rows = []
    for attack in attacks:
        with temporary_folder() as scratch:
            tally = run_attack(
                attack,
                arguments.material,
                scratch,
                seed=arguments.seed,
                seconds=10**6 if arguments.quick else arguments.seconds * attack.share / total,
                limit=attack.quick if arguments.quick else None,
                only=arguments.only,
            )
        isa = f" {arguments.isa}" if arguments.isa else ""
        announce(f"== {arguments.area}{isa}, {attack.name}: {tally.held:,} of {tally.tried:,} held")
        rows.append({"area": attack.area, "attack": attack.name, "isa": arguments.isa or "", **asdict(tally)})
    arguments.json.write_text(json.dumps(rows))
    return 0


def as_table(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, a line for each attack: the instruction sets of one attack together."""
    lines = ["| area | attack | tried | held |", "|---|---|--:|--:|"]
    for area, attack in dict.fromkeys((row["area"], row["attack"]) for row in rows):
        group = [row for row in rows if (row["area"], row["attack"]) == (area, attack)]
        isas = [row["isa"] for row in group if row["isa"]]
        tried, held = (sum(row[key] for row in group) for key in ("tried", "held"))
        lines.append(f"| {area} | {attack}{' (' + ', '.join(isas) + ')' if isas else ''} | {tried:,} | {held:,} |")
    return "\n".join(lines)


def record(table: str, seed: int, seconds: float) -> None:
    """Replace the table in docs/torture.md."""
    page = ROOT / "docs" / "torture.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- results -->\n")
    after = rest.partition("<!-- /results -->")[2]
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    processor = models[0] if models else platform.machine()
    status = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    threads, commit = len(os.sched_getaffinity(0)), status.stdout.strip()
    where = f"{time.strftime('%Y-%m-%d')}, {processor}, {threads} threads, commit {commit}"
    text = f"{where}, seed {seed}, {seconds:.0f} s.\n\n{table}\n"
    page.write_text(f"{before}<!-- results -->\n{text}<!-- /results -->{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
