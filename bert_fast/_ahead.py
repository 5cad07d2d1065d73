"""Work that a thread does ahead of the loop that takes its results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def map_ahead(function: Callable[[A], R], items: Iterable[A]) -> Generator[R, None, None]:
    """`map`, whose next result a thread computes while the caller works on the last one.

    One result is computed ahead. `items` is read by the caller's thread, one item ahead, and what it raises is raised
    at once; an exception of `function` is raised where its result would be returned. A single item needs no thread.
    The thread ends when the iterator is exhausted, raises or is closed (`contextlib.closing`), after the call of
    `function` that is under way.
    """
    iterator = iter(items)
    first = list(islice(iterator, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
    try:
        pending = thread.submit(function, first[0])
        for item in chain(first[1:], iterator):
            following = thread.submit(function, item)
            yield pending.result()
            pending = following
        yield pending.result()
    finally:
        thread.shutdown(cancel_futures=True)
