"""The table of Triton kernels compiled for sm_80, sm_90, sm_100 and sm_120: current, with spills and shared memory
within their bounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# For a separate process, in which Triton compiles: in this one its interpreter may run the kernels.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def report(*arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    command = ["-c", script] if script else ["-m", "benchmarks.reports.compile_report", *arguments]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_the_table_is_current_and_has_no_new_spills() -> None:
    done = report("--sample")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_compiles_where_its_integers_are_one() -> None:
    done = report("--ones")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3} launches compile with integers that are 1\n", done.stdout)


ONES = """
import sys
from benchmarks.reports import compile_report
from bert_fast.kernels.attention.triton import dropout
source = dropout.keep_scores.src
changed = source.replace("tl.cast(256 - threshold, tl.uint32)", "(256 - threshold).to(tl.uint32)")
assert changed != source
dropout.keep_scores._unsafe_update_src(changed)
sys.exit(compile_report.main())
"""


def test_a_kernel_that_takes_every_size_but_one_is_named() -> None:
    command = [sys.executable, "-c", ONES, "--ones"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^attention\.fwd_kernel with .*threshold.* = 1: ", done.stdout, re.MULTILINE)


WRONG = """
import sys
from benchmarks.reports import compile_report
rows = compile_report.read()
{change}
compile_report.read = lambda: rows
sys.exit(compile_report.main())
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows.pop()", "is stale: 1 rows are missing"),
        ("rows[0]['sources'] = '0' * 12", "is stale: 1 rows are missing, 1 are of old or unused sources"),
        ("rows[0]['stack'] = 1024", ": 1024 bytes of stack"),
        ("rows[0]['shared'] = 1 << 20", " bytes of shared memory"),
    ],
    ids=["missing", "old sources", "spill", "shared memory"],
)
def test_a_wrong_table_is_refused(change: str, message: str) -> None:
    done = report(script=WRONG.format(change=change))
    assert done.returncode == 1
    assert message in done.stdout


MULTIPLIES = {f"attention.{name}_kernel" for name in ("fwd", "bwd_one", "bwd_several", "dq", "dkv")} | {
    "masked_lm_loss._gemm_kernel"
}
# Too small for Hopper's HGMMA (64 rows per warpgroup): several short sequences in a tile, tiles of 32.
SMALL = (" BLOCK_S=16", " BLOCK_S=32", " TILE=32 ", " BLOCK_M=32 BLOCK_N=32")


def test_16_bit_products_use_the_matrix_units() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "triton_compile.json").read_text())
    products = [row for row in rows if row["kernel"] in MULTIPLIES and "*fp32" not in row["arguments"].split()[0]]
    assert {row["kernel"] for row in products} == MULTIPLIES
    for row in products:
        small = any(size in f"{row['constexprs']} " for size in SMALL)
        assert row["matrix"], row
        assert "HGMMA" in row["matrix"] or row["arch"] != "sm_90" or small, row


def test_every_op_with_triton_kernels_has_rows() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "triton_compile.json").read_text())
    ops = {path.parent.name for name in ("triton", "triton.py") for path in ROOT.glob(f"kernels/*/{name}")}
    assert {row["kernel"].partition(".")[0] for row in rows} - {"_common"} == ops
