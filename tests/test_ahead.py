"""A thread that works one item ahead: order, bound, exceptions, and no thread that stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from bert_fast._ahead import map_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_results_are_in_the_order_of_the_items() -> None:
    draws = [0.01, 0.0, 0.005, 0.0, 0.002] * 4

    def work(item: tuple[int, float]) -> int:
        time.sleep(item[1])
        return item[0]

    assert list(map_ahead(work, enumerate(draws))) == list(range(20))
    assert list(map_ahead(str, [])) == []
    assert not threads()


def test_one_result_is_computed_ahead_in_another_thread_and_items_are_read_here() -> None:
    computed: list[int] = []
    readers: set[int] = set()

    def items() -> Iterator[int]:
        for item in range(9):
            readers.add(threading.get_ident())
            yield item

    def work(item: int) -> int:
        computed.append(item)
        assert threading.get_ident() not in readers
        return item

    for result in map_ahead(work, items()):
        deadline = time.monotonic() + 30
        while len(computed) < min(result + 2, 9) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(computed) == min(result + 2, 9)
    assert readers == {threading.get_ident()}


def test_a_single_item_takes_no_thread() -> None:
    assert list(map_ahead(lambda _: threading.get_ident(), [0])) == [threading.get_ident()]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_is_raised_where_its_result_would_be(kind: type[BaseException]) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise kind("the fourth")
        return item

    results = map_ahead(work, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(kind, match="the fourth"):
        next(results)
    assert not threads()


def test_an_exception_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        yield 2
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(map_ahead(int, items()))
    assert not threads()


def test_an_exception_in_the_loop_ends_the_thread() -> None:
    def loop() -> None:
        with closing(map_ahead(int, iter(range(10**9)))) as results:
            for result in results:
                if result == 2:
                    raise RuntimeError("in the loop")

    with pytest.raises(RuntimeError, match="in the loop"):
        loop()
    assert not threads()


def test_ctrl_c_ends_the_process_at_once() -> None:
    code = (
        "import signal, time\n"
        "from contextlib import closing\n"
        "from bert_fast._ahead import map_ahead\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with closing(map_ahead(lambda item: time.sleep(0.2), range(10**9))) as results:\n"
        "    print('ready', flush=True)\n"
        "    for _ in results: pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(2)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert error.rstrip().endswith("KeyboardInterrupt")
