"""The built-in corpus: English prose that comes with every Python installation.

It consists of the language reference in `pydoc_data.topics` and of the docstrings of the standard library and of
installed packages, which are parsed with `ast` and never imported.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bert_fast.data.cleaning import Document
from bert_fast.data.docstrings import docstring_sentences

# Dependencies of torch and bert_fast with long docstrings in full sentences.
DEFAULT_PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
_MIN_SENTENCES = 8  # shorter neighbours in a file are joined, so that documents have a context to predict from


def builtin_documents(packages: Sequence[str] | None = None) -> Iterator[Document]:
    """The language reference and the docstrings of the standard library and of `packages`, in a fixed order.

    A file yields one document for its module and functions and one for each class; short documents are joined.
    Repeated sentences (boilerplate) are dropped, so no document is a copy of another.

    Args:
        packages: names of installed packages, which are not imported; if None, those of `DEFAULT_PACKAGES` that are
            installed.

    Raises:
        ValueError: a requested package is not installed, or has no source files.
    """
    seen: set[bytes] = set()
    for document in _builtin_with_repeats(packages):
        sentences = []
        for sentence in document:
            digest = hashlib.blake2b(sentence.lower().encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                sentences.append(sentence)
        if len(sentences) >= 2:
            yield sentences


def _builtin_with_repeats(packages: Sequence[str] | None) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield docstring_sentences(topics[name])
    folders = [Path(sysconfig.get_path("stdlib"))]
    for name in DEFAULT_PACKAGES if packages is None else packages:
        folder = package_folder(name)
        if folder is not None:
            folders.append(folder)
        elif packages is not None:
            raise ValueError(f"package {name!r} is not installed as a folder of files; install it or leave it out")
    for folder in folders:
        for path in source_files(folder):
            yield from file_documents(path)


def package_folder(name: str) -> Path | None:
    """The folder of an installed top-level package, or None; the package is not imported."""
    try:
        spec = importlib.util.find_spec(name) if "." not in name else None
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def source_files(folder: Path) -> list[Path]:
    """The Python files below a folder, sorted, without tests and generated code."""
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(part.lower() for part in path.relative_to(folder).parts)
    ]


@contextmanager
def _no_collector() -> Iterator[None]:
    # A syntax tree has many objects and no cycles: the garbage collector would take half of the time for nothing.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def file_documents(path: Path) -> list[Document]:
    """The docstrings of one source file as documents; none if the file is not valid Python."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    with _no_collector():
        return list(_source_documents(source))


def _source_documents(source: bytes) -> Iterator[Document]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or syntax of another Python version
        return
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    groups: list[list[ast.AST]] = [[tree, *functions]]
    groups += [list(_class_members(node)) for node in tree.body if isinstance(node, ast.ClassDef)]
    document: Document = []
    for group in groups:
        for node in group:
            if text := ast.get_docstring(node, clean=False):  # type: ignore[arg-type]
                document += docstring_sentences(text)
        if len(document) >= _MIN_SENTENCES:
            yield document
            document = []
    if document:
        yield document


def _class_members(node: ast.ClassDef) -> Iterator[ast.AST]:
    yield node
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _class_members(child)
