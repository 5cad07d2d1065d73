"""The table of the CUDA kernels compiled by nvcc: complete, current, and without new spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reports import cuda_report

REPORT = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN9bert_fast12_GLOBAL__N_14rowsIfLi4ELb0EEEvPKT_' for 'sm_90a'
ptxas info    : Function properties for _ZN9bert_fast12_GLOBAL__N_14rowsIfLi4ELb0EEEvPKT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 1024 bytes smem, 416 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN9bert_fast9plain_oneEPKf' for 'sm_80'
ptxas info    : Function properties for _ZN9bert_fast9plain_oneEPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_table_is_current() -> None:
    stale = [str(path) for path in cuda_report.stale(cuda_report.read())]
    assert not stale, f"run python -m benchmarks.reports.cuda_report --write for {stale}"


def test_known_spills_are_bounded() -> None:
    kernel = "add_layer_norm_backward<float, true, 16>"
    bound = cuda_report.allowed(kernel)
    assert bound > 0
    for spilled, wrong in ((bound, 0), (bound + 1, 1)):
        row = {"kernel": kernel, "arch": "sm_80", "spilled": spilled}
        assert len(cuda_report.problems({"files": {"a.cu": {"rows": [row]}}})) == wrong


def test_table_has_every_source_on_every_architecture_and_no_other_spills() -> None:
    table = cuda_report.read()
    assert sorted(table["files"]) == [str(path.relative_to(cuda_report.ROOT)) for path in cuda_report.cuda_sources()]
    for name, entry in table["files"].items():
        kernels = {row["kernel"] for row in entry["rows"]}
        rows = {(row["kernel"], row["arch"]) for row in entry["rows"]}
        expected = cuda_report.architectures(cuda_report.ROOT / name)
        assert rows == {(kernel, f"sm_{arch}") for kernel in kernels for arch in expected}
    assert not cuda_report.problems(table)


def test_kernels_for_hopper_use_its_instructions() -> None:
    """wgmma is HGMMA in the machine code, bulk copies of tensors are UTMALDG; HMMA is not used."""
    rows = [
        row
        for name, entry in cuda_report.read()["files"].items()
        if cuda_report.HOPPER in name
        for row in entry["rows"]
    ]
    kernels = {
        f"{name}<{dtype}, {dim}, {dropout}>"
        for name in ("hopper_forward", "hopper_dq", "hopper_dkv")
        for dtype in ("BFloat16", "Half")
        for dim in (64, 128)
        for dropout in ("false", "true")
    }
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        # At least 8: two products per step, each over 64 elements in groups of 16.
        assert row["matrix"]["HGMMA"] >= 8, row
        assert row["matrix"]["UTMALDG"] >= 3, row
        assert "HMMA" not in row["matrix"], row


def test_the_report_of_ptxas_is_parsed() -> None:
    rows = cuda_report.parse(REPORT)
    assert rows == [
        {"kernel": "plain_one", "arch": "sm_80", "registers": 12, "stack": 0, "spilled": 0, "shared": 0},
        {
            "kernel": "rows<float, 4, false>",
            "arch": "sm_90a",
            "registers": 40,
            "stack": 16,
            "spilled": 12,
            "shared": 1024,
        },
    ]
    assert cuda_report.problems({"files": {"a.cu": {"rows": rows}}}) == [
        "rows<float, 4, false> on sm_90a spills 12 bytes; expected at most 0"
    ]


def test_the_hash_includes_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_report, "ROOT", tmp_path)
    folder = tmp_path / "csrc" / "op"
    folder.mkdir(parents=True)
    source = folder / "op_cuda.cu"
    source.write_text('#include "op/one.h"\n#include <vector>\n')
    (folder / "one.h").write_text('#include "op/two.h"\n')
    (folder / "two.h").write_text("int x;\n")
    before = cuda_report.sources_hash(source)
    (folder / "two.h").write_text("int y;\n")
    assert cuda_report.sources_hash(source) != before
