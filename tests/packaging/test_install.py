"""The wheel, the sdist, the build without a compiler and the name `kernels`, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.sources import ROOT, source_files

OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))


def run(*command: str, cwd: Path, **environment: str) -> str:
    """The standard output of `command`; AssertionError with all of its output if it fails."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as git sees it: tracked and new files, without build products."""
    target = tmp_path_factory.mktemp("source")
    for name in source_files():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without compiled code, which the editable install and with it the whole suite covers."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out), ".",
        cwd=source, BERT_FAST_NATIVE="0",
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(
        sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(target), str(wheel),
        cwd=target,
    )  # fmt: skip
    return target


def test_wheel_holds_every_op_and_only_the_package_bert_fast(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"bert_fast"}
    for op in OPS:
        assert f"bert_fast/kernels/{op}/__init__.py" in names
    assert "bert_fast/py.typed" in names


def test_sdist_holds_the_sources(source: Path, tmp_path: Path) -> None:
    run(
        sys.executable, "-c", "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])",
        str(tmp_path), cwd=source, BERT_FAST_NATIVE="0",
    )  # fmt: skip
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    patterns = ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "kernels/*/*.py")
    expected = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    assert expected <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


# Removes the finder of the editable install, through which the wheel would import the compiled modules.
ALONE = "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in finder.__module__]\n"

USE = """
import importlib.util, torch
assert importlib.util.find_spec("bert_fast").origin.startswith({site!r})
from bert_fast.kernels import available_impls, bias_gelu, ImplUnavailableError
impls = available_impls()["bias_gelu"]
assert impls["reference"].ok and not impls["cpu"].ok
assert "BERT_FAST_NATIVE=0" in impls["cpu"].reason, impls["cpu"].reason
x = torch.randn(3, 5)
assert torch.equal(bias_gelu(x, torch.zeros(5)), torch.nn.functional.gelu(x))
try:
    bias_gelu(x, torch.zeros(5), impl="cpu")
except ImplUnavailableError as error:
    assert "BERT_FAST_NATIVE=0" in str(error) and "reference" in str(error)
else:
    raise AssertionError("impl='cpu' fell back to another implementation")
"""


def test_wheel_without_native_code_runs_the_reference_and_reports_the_reason(installed: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", ALONE + USE.format(site=str(installed)), cwd=tmp_path, PYTHONPATH=str(installed))


def test_a_package_named_kernels_keeps_its_name(installed: Path, tmp_path: Path) -> None:
    """`import kernels` in the checkout imports an installed package of that name, not the folder `kernels/`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9.9'\n")
    code = "import kernels, bert_fast.kernels; assert kernels.__version__ == '9.9', kernels"
    run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=os.pathsep.join([str(installed), str(tmp_path)]))


def test_transformers_does_not_take_the_folder_for_the_package_kernels() -> None:
    code = "from transformers.utils import is_kernels_available; assert not is_kernels_available()"
    run(sys.executable, "-c", code, cwd=ROOT)


def test_a_missing_compiler_is_reported_and_does_not_fail_the_build(source: Path, tmp_path: Path) -> None:
    """Without a compiler on PATH the build succeeds and records the reason."""
    build = tmp_path / "lib"
    printed = run(
        sys.executable, "setup.py", "build_ext", "--build-lib", str(build), "--build-temp", str(tmp_path / "temp"),
        cwd=source, PATH="", CXX="no-such-compiler",
    )  # fmt: skip
    assert "bert_fast._C: not built: no C++ compiler was found" in printed
    assert "no C++ compiler was found" in (build / "bert_fast" / "_build_info.json").read_text()
