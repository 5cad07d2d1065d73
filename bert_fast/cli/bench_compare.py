"""Compare recorded benchmarks: mark what got slower or faster beyond the noise; exit code 1 where something is worse.

    bert-fast bench compare before.json after.json
    bert-fast bench compare before.json between.json after.json --html changes.html

Each argument is a file of `bert-fast bench`, or a folder of such files. The last is compared with each of the others. A
variant is slower where the 95 % intervals of the medians don't overlap and the medians differ by more than --threshold;
one that is now refused, or no longer there, is worse too. The exit code is that of ours and of registered kernels; ops
that only one of the files has are not compared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bert_fast.cli.standard import as_option


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `bench compare FILE FILE --option` as `bench compare --files FILE FILE --option`."""
    return as_option(arguments, "--files")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--files", type=list[str] | None, default=None, help="files or folders, the newest last")
    parser.add_argument("--threshold", type=float, default=0.05, help="relative difference that counts")
    parser.add_argument("--all", type=bool, default=False, help="also what did not change")
    parser.add_argument("--html", type=str | None, default=None, help="write this HTML page")


def run(args: Any) -> int:
    from bert_fast._io import write_text
    from bert_fast.bench import compare, page

    paths = [Path(name) for name in args.files or []]
    if len(paths) < 2:
        raise ValueError(f"bench compare got {len(paths)} file{'s' * (len(paths) != 1)}; expected two or more")
    if not 0 <= args.threshold < 10:
        raise ValueError(f"--threshold is {args.threshold}; expected a relative difference such as 0.05")
    reports = [compare.load(path) for path in paths]
    status, sections = 0, []
    for path, old in zip(paths[:-1], reports[:-1], strict=True):
        for doubt in compare.doubts(old, reports[-1]):
            print(f"bert-fast bench compare: warning: {path} and {paths[-1]}: {doubt}", file=sys.stderr)
        changes = compare.compare(old, reports[-1], args.threshold)
        table = compare.lines(changes, all_of_them=args.all)
        worse = compare.worse(changes)
        counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in _ordered(changes)}
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to compare"
        print(f"{path} -> {paths[-1]}: {summary}")
        for line in table[1:]:
            print("  " + "  ".join(line))
        sections.append((f"{path.name} → {paths[-1].name}", summary, compare.lines(changes, all_of_them=True)))
        status = status or int(bool(worse))
    if args.html:
        write_text(Path(args.html), page.of_comparison(sections, dict(zip(map(str, paths), reports, strict=True))))
        print(f"written: {args.html}")
    return status


def _ordered(changes: Any) -> list[str]:
    return list(dict.fromkeys(change.verdict for change in changes))
