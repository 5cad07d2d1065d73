"""Sources of documents. A document is a list of sentences, a source can be read any number of times.

The built-in corpus is English prose that every Python installation already has: the language reference of
`pydoc_data.topics`, and the docstrings of the standard library and of installed packages, read with `ast` from the
source files and never imported.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bert_fast.data import files
from bert_fast.data.sentences import Document, docstring_sentences

# Packages that torch brings along or that bert_fast needs, with long docstrings in full sentences.
DEFAULT_PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
_FEWEST_SENTENCES = 8  # shorter neighbours in a file are joined, so that documents have a context to predict from


def builtin_documents(packages: Sequence[str] | None = None) -> Iterator[Document]:
    """The language reference and the docstrings of the standard library and of `packages`, in a fixed order.

    A file gives one document for its module and functions and one a class; small ones are joined. Sentences that
    occurred before are left out (boilerplate), so no document is a copy of another.

    Args:
        packages: names of importable packages, none of which is imported; `DEFAULT_PACKAGES` where installed if None.

    Raises:
        ValueError: a package that was asked for is not installed, or has no source files.
    """
    seen: set[bytes] = set()
    for document in _builtin_with_repeats(packages):
        fresh = []
        for sentence in document:
            digest = hashlib.blake2b(sentence.lower().encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                fresh.append(sentence)
        if len(fresh) >= 2:
            yield fresh


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
    """Where an importable top-level package lies, or None."""
    try:
        spec = importlib.util.find_spec(name) if "." not in name else None
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def source_files(folder: Path) -> list[Path]:
    """The Python files under a folder, without tests and generated code, sorted."""
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(part.lower() for part in path.relative_to(folder).parts)
    ]


@contextmanager
def _no_collector() -> Iterator[None]:
    # A syntax tree is many objects and no cycles: the garbage collector takes half of the time and finds nothing.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def file_documents(path: Path) -> list[Document]:
    """The docstrings of one source file as documents; none where the file can't be read as Python."""
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
        if len(document) >= _FEWEST_SENTENCES:
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


class Corpus:
    """Documents of one or several sources, in their order; iterating again reads them again.

    Args:
        sources: `builtin`, `datasets:NAME`, or paths of files and folders, see `bert_fast.data.files`.
        packages: for `builtin`, see `builtin_documents`.
        text_column: the column with the text in .jsonl, .csv, .parquet and datasets; guessed if None.
        one_document_per_line: how .txt is read; otherwise a sentence a line, blank lines between documents.
        max_documents: stop after so many.

    Raises:
        ValueError: a source doesn't exist, or has a format that isn't known.
    """

    def __init__(
        self,
        sources: Sequence[str] = ("builtin",),
        *,
        packages: Sequence[str] | None = None,
        text_column: str | None = None,
        one_document_per_line: bool = False,
        max_documents: int | None = None,
    ) -> None:
        if not sources or isinstance(sources, str):
            raise ValueError(f"sources is {sources!r}; expected a list such as ['builtin'] or ['notes.txt', 'more/']")
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents is {max_documents}; expected 1 or more, or None for all")
        self.sources: list[str | Path] = []
        for source in sources:
            named = source == "builtin" or source.startswith("datasets:")
            self.sources += [source] if named else files.find_files(source)
        self.packages = packages
        self.text_column = text_column
        self.one_document_per_line = one_document_per_line
        self.max_documents = max_documents
        self._builtin: list[Document] | None = None

    def __iter__(self) -> Iterator[Document]:
        for count, document in enumerate(self._documents()):
            if count == self.max_documents:
                return
            yield document

    def _documents(self) -> Iterator[Document]:
        for source in self.sources:
            for document in self._read(source):
                if sentences := [text for sentence in document if (text := " ".join(sentence.split()))]:
                    yield sentences

    def _read(self, source: str | Path) -> Iterable[Document]:
        if source == "builtin":
            return self._read_builtin()
        if isinstance(source, str):
            return files.read_dataset(source.removeprefix("datasets:"), self.text_column)
        return files.read_file(source, self.text_column, self.one_document_per_line)

    def _read_builtin(self) -> Iterator[Document]:
        if self._builtin is not None:
            yield from self._builtin
            return
        documents = []  # kept: parsing takes seconds, and a corpus is read several times
        for document in builtin_documents(self.packages):
            documents.append(document)
            yield document
        self._builtin = documents
