"""The layout: every op is complete under its one name, README's table of ops is the registry's, no file is too long."""

from __future__ import annotations

import re

import pytest
import torch

import bert_fast.kernels
from bert_fast.kernels import ImplUnavailableError, available_impls, use_impl
from bert_fast.kernels._common import dispatch
from bert_fast.kernels._common.dispatch import IMPLS
from tests.sources import ROOT, source_files

OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/api.py"))


def test_available_impls_lists_the_ops_and_the_implementations_that_exist() -> None:
    assert sorted(available_impls()) == OPS
    for op, impls in available_impls().items():
        assert list(impls) == [impl for impl in IMPLS if impl in dispatch.OPS[op].impls]
        assert impls["reference"] == (True, True, "")
        assert all(state.ok or state.reason for state in impls.values())


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op: str) -> None:
    files = set(source_files())
    expected = {f"kernels/{op}/{part}" for part in ("__init__.py", "api.py", "op.py", "reference.py", "README.md")}
    expected |= {f"kernels/{op}/cases.py", f"tests/kernels/test_{op}.py"}
    assert expected <= files, f"missing: {sorted(expected - files)}"


@pytest.mark.parametrize("op", OPS)
def test_the_implementations_of_an_op_are_its_files(op: str) -> None:
    files = source_files()

    def exists(stem: str, suffix: str) -> bool:
        return any(name == f"{stem}{suffix}" or name.startswith(f"{stem}/") for name in files)

    from_files = {
        "reference": True,
        "triton": exists(f"kernels/{op}/triton", ".py"),
        "cuda": exists(f"csrc/{op}/cuda", ".cu"),
        "cpu": exists(f"csrc/{op}/cpu", ".cpp"),
    }
    impls = dispatch.OPS[op].impls
    assert from_files == {impl: impl in impls and not impls[impl].built_on for impl in IMPLS}


def test_readme_has_the_table_of_implementations() -> None:
    table = dispatch.implementations_table()
    assert f"<!-- ops -->\n{table}\n<!-- /ops -->" in (ROOT / "README.md").read_text(), f"expected:\n{table}"


def test_public_functions_document_the_implementations_that_exist() -> None:
    documented = set()
    for name in bert_fast.kernels.__all__:
        function = getattr(bert_fast.kernels, name)
        op = function.__module__.split(".")[2]
        if op not in OPS or "impl" not in getattr(function, "__annotations__", {}):
            continue
        line = next(line for line in function.__doc__.splitlines() if line.startswith("        impl: "))
        assert re.findall(r'"(\w+)"', line.split(";")[0]) == ["auto", *dispatch.OPS[op].impls], name
        documented.add(op)
    assert sorted(documented) == OPS


def test_an_implementation_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(
        ImplUnavailableError, match=r"lamb: impl='cuda' does not exist; this op has reference, triton, cpu\. "
    ):
        dispatch.OPS["lamb"].select("cuda", torch.zeros(1))
    with use_impl("cuda"), pytest.raises(ImplUnavailableError, match="impl='cuda' does not exist"):
        dispatch.OPS["padding"].select("auto", torch.zeros(1))
    with pytest.raises(ValueError, match="impl is 'fast'; expected one of auto, reference, triton, cuda, cpu"):
        dispatch.OPS["lamb"].select("fast", torch.zeros(1))


def test_public_functions_are_exported_and_documented() -> None:
    for name in bert_fast.kernels.__all__:
        exported = getattr(bert_fast.kernels, name)
        assert exported.__doc__, f"{name} has no docstring"


def test_every_auto_rule_has_its_measurement() -> None:
    for op in dispatch.OPS.values():
        for rule in op.auto_rules:
            assert any(character.isdigit() for character in rule.measured), f"{op.name}: {rule}"


def test_no_source_file_is_longer_than_it_can_be_read() -> None:
    long = {
        name: lines
        for name in source_files()
        if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))
        and (lines := len((ROOT / name).read_text().splitlines())) > 600
    }
    assert not long, long


def test_no_empty_files_but_the_type_marker() -> None:
    assert [name for name in source_files() if not (ROOT / name).stat().st_size] == ["bert_fast/py.typed"]
