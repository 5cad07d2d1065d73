"""Picks the data side's hot loops: the C++ module `bert_fast._host` where it was built, else its numpy twin.

Both give the same bits. `BERT_FAST_HOST=numpy` (or `cpp`) sets what `auto` means, `host(impl)` asks for one.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

IMPLS = ("auto", "cpp", "numpy")


def host(impl: str = "auto") -> ModuleType:
    """The module with `plan`, `pack` and `build_batch`, see `bert_fast.data.host_numpy` for what they do.

    Args:
        impl: `auto`, `cpp` or `numpy`. `auto` is what the environment variable BERT_FAST_HOST says, or else `cpp`
            where it was built and `numpy` where not.

    Raises:
        ValueError: `impl`, or BERT_FAST_HOST, is none of the three.
        ImportError: `cpp` was asked for and is not built.
    """
    if impl == "auto":
        impl = os.environ.get("BERT_FAST_HOST", "auto")
    if impl not in IMPLS:
        raise ValueError(f"the host implementation is {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl != "numpy":
        try:
            return importlib.import_module("bert_fast._host")
        except ImportError as error:
            if impl == "cpp":
                raise ImportError(
                    "bert_fast._host is not built: install with a C++ compiler and pybind11, or use impl='numpy'"
                ) from error
    return importlib.import_module("bert_fast.data.host_numpy")
