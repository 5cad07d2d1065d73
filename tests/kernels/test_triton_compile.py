"""Every Triton kernel compiled ahead of time for sm_80, sm_90, sm_100 and sm_120: the checked-in table is of today's
sources, and nothing in it spills or asks for more shared memory than there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own, where Triton compiles: in this one its interpreter may have taken the kernels.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def report(*arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    what = ["-c", script] if script else ["-m", "benchmarks.compile_report", *arguments]
    return subprocess.run(
        [sys.executable, *what], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_the_table_is_current_and_without_spills() -> None:
    done = report("--sample")
    assert done.returncode == 0, done.stdout + done.stderr


SPOILED = """
import sys
from benchmarks import compile_report
rows = compile_report.read()
{change}
compile_report.read = lambda: rows
sys.exit(compile_report.main())
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows.pop()", "is stale: 1 rows are missing"),
        ("rows[0]['sources'] = '0' * 12", "is stale: 1 rows are missing, 1 are of old sources"),
        ("rows[0]['stack'] = 8", ": 8 bytes of stack"),
        ("rows[0]['shared'] = 1 << 20", " bytes of shared memory"),
    ],
    ids=["missing", "old sources", "spill", "shared memory"],
)
def test_a_spoiled_table_is_refused(change: str, message: str) -> None:
    done = report(script=SPOILED.format(change=change))
    assert done.returncode == 1
    assert message in done.stdout
