"""Signs of life: which rank it is that the others wait for.

A collective that fails, or never ends, does not say whose fault it is. So a thread of each rank counts up a number in
the store through which the ranks found each other; a rank whose number stands still is lost: it was killed, stopped, or
its machine is gone. Rank 0 watches all others, they watch rank 0. Each reads its own clock alone: they need not agree.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

EXIT_CODE = 70  # of a process whose main thread can't be told, since it waits for the device


class Heartbeat:
    """The thread that gives and reads the signs of life of `world` ranks.

    Args:
        rank, world: number of this process, and of all.
        timeout: seconds without a sign after which a rank is lost. stderr names it a little before; where the main
            thread does not come back from its collective, the process ends a little after.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self._rank, self._world, self._timeout = rank, world, timeout
        self._interval = min(2.0, timeout / 10)
        now = time.monotonic()
        self._seen: dict[int, dict[str, Any]] = {
            other: {"beat": 0, "name": f"rank {other}", "end": None, "since": now}
            for other in range(world)
            if other != rank
        }
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=min(timeout, 60.0)))
        # A job that torchrun starts again finds what the last attempt left.
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = dist.PrefixStore(f"bert_fast/heartbeat/{attempt}", client)
        self._lock = threading.Lock()
        self._name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._beats, self._connected = 0, True
        self._end: str | None = None
        self._beat()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> list[str]:
        """End the thread; after an `error` of the run, look first whose fault it is.

        Returns:
            A sentence for each rank that is lost or had failed before; none without an error.
        """
        blamed: list[str] = []
        if isinstance(error, RuntimeError):
            deadline = time.monotonic() + 4 * self._interval
            while not (blamed := self._failed()) and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
            blamed = blamed or self._silent(list(self._seen), 3 * self._interval)
        text = None if error is None else f"{type(error).__name__}: {error}"
        with self._lock:
            self._tell(text if text and not blamed else "left")
        if error is not None and self._rank == 0:
            time.sleep(2 * self._interval)  # the store may be this process's: the others are still looking
        self._stopped.set()
        self._thread.join(timeout=self._interval + 1)
        return blamed

    def _failed(self) -> list[str]:
        """Ranks that said why they ended."""
        ends = [(seen["name"], seen["end"]) for seen in self._look(list(self._seen)).values()]
        return [f"{name} failed: {end}" for name, end in ends if end not in (None, "left")]

    def _silent(self, others: list[int], seconds: float) -> list[str]:
        now = time.monotonic()
        # With the store, which is in rank 0's process or its torchrun, every sign of life is gone: only it is to blame.
        asked = [self._seen[other] for other in (others if self._connected else {0} & set(others))]
        quiet = [(seen["name"], now - seen["since"]) for seen in asked if seen["end"] is None]
        return [f"{name} has given no sign of life for {age:.0f} s" for name, age in quiet if age > seconds]

    def _beat(self) -> None:
        self._beats += 1
        self._tell(None)

    def _tell(self, end: str | None) -> None:
        self._end = end
        try:
            self._store.set(str(self._rank), json.dumps({"beat": self._beats, "name": self._name, "end": end}))
        except RuntimeError:
            self._connected = False

    def _look(self, others: list[int]) -> dict[int, dict[str, Any]]:
        """What is known of all, after noting which of `others` have moved on since the last look."""
        with self._lock:
            for other in others:
                try:
                    if not self._store.check([str(other)]):
                        continue
                    found = json.loads(self._store.get(str(other)))
                except RuntimeError:
                    self._connected = False
                    break
                seen = self._seen[other]
                moved = found["beat"] != seen["beat"]
                self._seen[other] = {**found, "since": time.monotonic() if moved else seen["since"]}
        return self._seen

    def _run(self) -> None:
        watched = [other for other in self._seen if self._rank == 0 or other == 0]
        said = False
        while not self._stopped.wait(self._interval):
            with self._lock:
                if self._end is None:
                    self._beat()
            self._look(watched)
            if self._end is None and not said and (lost := self._silent(watched, 0.9 * self._timeout)):
                print("; ".join(lost), file=sys.stderr, flush=True)
                said = True
            if self._silent(watched, self._timeout + 10):
                os._exit(EXIT_CODE)
