"""What the documents say of the repository holds: DESIGN's tree, the packages' purposes, links, commands, words."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.sources import ROOT, source_files

DOCUMENTS = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/torture.md"]
DOCUMENTS += ["docs/sentence-transformers.md", "benchmarks/results/PENDING.md"]
# Patterns of the tree, and a folder that each stands for.
EXAMPLES = {"kernels/<op>": "kernels/attention", "csrc/<op>": "csrc/attention"}


def folders_of_the_tree() -> list[str]:
    """The folders of DESIGN's tree, in full; a line is a folder and its purpose, indented below the folder it is in."""
    block = (ROOT / "DESIGN.md").read_text(encoding="utf-8").split("```")[1]
    folders, top = [], ""
    for line in block.splitlines():
        if match := re.match(r"( {0,2})([\w<>/]+)/ +\S", line):
            top = top if match[1] else match[2]
            folders.append(f"{top}/{match[2]}" if match[1] else top)
    return folders


def test_the_tree_in_design_is_the_tree() -> None:
    listed = {EXAMPLES.get(folder, folder) for folder in folders_of_the_tree()}
    missing = sorted(folder for folder in listed if not (ROOT / folder).is_dir())
    assert not missing, f"DESIGN.md lists folders that do not exist: {missing}"
    ops = {path.parent.name for path in ROOT.glob("kernels/*/api.py")}
    for parent in ("kernels", "csrc", "bert_fast", "benchmarks"):
        children = {
            Path(name).parts[1] for name in source_files() if name.startswith(f"{parent}/") and name.count("/") > 1
        }
        children -= ops | {"verified"}
        unlisted = sorted(child for child in children if f"{parent}/{child}" not in listed)
        assert not unlisted, f"DESIGN.md does not list {unlisted} of {parent}/"


@pytest.mark.parametrize(
    "file", sorted(name for name in source_files() if name.endswith("__init__.py") and not name.startswith("tests/"))
)
def test_a_package_states_its_purpose_in_its_first_line(file: str) -> None:
    purpose = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert purpose, f"{file} has no docstring"
    assert len(purpose.splitlines()[0]) > 20, f"{file}: {purpose.splitlines()[0]!r} says too little"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for module in set(re.findall(r"python3? -m ((?:benchmarks|bert_fast|examples)[\w.]*\w)", text)):
        assert importlib.util.find_spec(module) is not None, f"{document} names the module {module}"
    for path in set(
        re.findall(r"`((?:tests|benchmarks|csrc|kernels|bert_fast)/[\w/]+\.(?:py|h|cpp|cu|json|md))`", text)
    ):
        results = path.startswith("benchmarks/results/")
        assert results or (ROOT / path).exists(), f"{document} names the file {path}"
    for link in set(re.findall(r"\]\(([\w./-]+)\)", text)):
        assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"


def test_words_of_our_own_stay_out() -> None:
    """An operation is an op, its public function the API: CONTRIBUTING has the words."""
    pattern = re.compile(r"\b[rd]o{2}[mr]s?\b", re.IGNORECASE)
    uses = []
    for name in source_files():
        if name.endswith((".py", ".md", ".h", ".cpp", ".cu", ".toml", ".yaml")):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            uses += [f"{name}:{number}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert not uses, uses
