"""Imports, in fresh processes: the package needs neither triton nor a compiler nor transformers; layers import down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ImportError(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Block())
"""
FORWARD = """
import torch, bert_fast
from bert_fast import BertConfig, BertForPreTraining
model = BertForPreTraining(BertConfig.size("tiny", vocab_size=50)).eval()
ids = torch.arange(12).view(2, 6)
mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
out = model(input_ids=ids, attention_mask=mask)
assert out.prediction_logits.shape == (2, 6, 50) and bool(out.prediction_logits.isfinite().all())
"""


def run(code: str, *blocked: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPTIONAL = (
    "transformers",
    "tokenizers",
    "pyarrow",
    "jsonargparse",
    "tqdm",
    "tensorboard",
    "huggingface_hub",
    "datasets",
    "sklearn",
    "scipy",
    "seqeval",
    "matplotlib",
    "captum",
    "sentencex",
    "rjieba",
    "ray",
)


@pytest.mark.parametrize(
    "blocked",
    [("triton",), OPTIONAL, ("triton", "bert_fast._C", "bert_fast._host", *OPTIONAL)],
    ids=["no triton", "no optional package", "nothing but torch and numpy"],
)
def test_the_encoder_runs_without(blocked: tuple[str, ...]) -> None:
    run(FORWARD, *blocked)


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["info", "--json"],
        ["verify", "--ops", "bias_gelu", "--impls", "reference"],
        ["verify", "--help"],
    ],
    ids=" ".join,
)
def test_info_and_verify_run_where_only_torch_is_installed(command: list[str]) -> None:
    code = f"""
from bert_fast.cli.main import main
try:
    assert main({command!r}) == 0
except SystemExit as end:
    assert end.code == 0
"""
    assert run(code, "triton", "yaml", *OPTIONAL)


def test_without_the_compiled_module_every_op_has_its_reference_and_a_reason() -> None:
    code = """
from bert_fast.kernels import available_impls
for op, impls in available_impls().items():
    assert impls["reference"].ok, op
    assert op == "lamb" or (not impls["cpu"].ok and "not built" in impls["cpu"].reason), (op, impls)
"""
    run(code, "bert_fast._C")


def test_importing_the_package_does_not_import_optional_packages() -> None:
    code = f"""
import sys, torch  # torch itself imports tqdm
before = set(sys.modules)
import bert_fast, bert_fast.kernels
print([name for name in {OPTIONAL!r} if name in sys.modules and name not in before])
"""
    assert run(code).strip() == "[]"


# What a package must not import: the packages above it.
ABOVE = {
    "invariants": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks"],
    "testing": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks", "integrations", "models", "data"],
    "integrations": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks"],
    "tasks": ["cli", "finetune", "pretrain", "runtime", "optim", "integrations"],
    "finetune": ["cli", "integrations"],
    "pretrain": ["cli", "finetune", "tasks", "integrations"],
    "runtime": ["cli", "finetune", "pretrain", "tasks", "integrations"],
    "optim": ["cli", "finetune", "pretrain", "runtime", "tasks", "integrations"],
    "models": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks", "integrations"],
    "data": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks", "integrations", "models", "kernels"],
    "kernels": ["cli", "finetune", "pretrain", "runtime", "optim", "tasks", "integrations", "models", "data"],
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith("bert_fast")}


@pytest.mark.parametrize("layer", ABOVE)
def test_imports_run_one_way(layer: str) -> None:
    above = tuple(f"bert_fast.{name}" for name in ABOVE[layer])
    folder = ROOT / "kernels" if layer == "kernels" else ROOT / "bert_fast" / layer
    for path in folder.rglob("*.py"):
        upward = [name for name in imported_modules(path) if name.startswith(above)]
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


# What a module of an op imports of its op: api -> op -> {reference, triton, cpu_backends}. triton is imported lazily,
# and the INT8 API asks cpu_backends for the largest weight that the CPU multiplies. `memory` is lamb's: how the kernels
# read a list of tensors.
WITHIN_AN_OP = {
    "__init__": {"api"},
    "api": {"op", "cpu_backends"},
    "op": {"reference", "cpu_backends"},
    "reference": set(),
    "triton": {"triton", "memory"},
    "cpu_backends": {"memory"},
    "memory": set(),
}


def test_an_op_imports_one_way_and_no_other_op() -> None:
    kernels = ROOT / "kernels"
    ops = {path.parent.name for path in kernels.glob("*/api.py")}
    for path in sorted(kernels.rglob("*.py")):
        op, module = path.relative_to(kernels).with_suffix("").parts[:2]
        if op in ops and module not in WITHIN_AN_OP:
            continue  # descriptions for tools
        for name in imported_modules(path):
            other, *rest = [*name.split(".")[2:], ""]
            if other not in ops:
                continue
            assert op == other, f"{path.relative_to(ROOT)} imports {name}"
            assert rest[0] in ("", *WITHIN_AN_OP[module]), f"{path.relative_to(ROOT)} imports {name}"
