"""Heartbeats: which rank the others are waiting for.

A collective that fails, or never returns, does not say which rank caused it. A thread of each rank therefore increments
a counter in the store of the process group; a rank whose counter stops is lost: it was killed or stopped, or its
machine is gone. Rank 0 watches all others, they watch rank 0. Each rank uses its own clock only, so clocks need not
agree.
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

EXIT_CODE = 70  # of a process whose main thread waits for the device and can't raise


class Heartbeat:
    """The thread that sends and reads the heartbeats of the ranks.

    Args:
        rank, world_size: as in torch.distributed.
        timeout: seconds without a heartbeat after which a rank is lost. A message on stderr names it shortly before; a
            process whose main thread does not return from its collective exits shortly after.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self._rank, self._timeout = rank, timeout
        self._interval = min(2.0, timeout / 10)
        now = time.monotonic()
        self._peers: dict[int, dict[str, Any]] = {
            peer: {"beat": 0, "name": f"rank {peer}", "end": None, "since": now}
            for peer in range(world_size)
            if peer != rank
        }
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=min(timeout, 60.0)))
        # The store outlives an attempt that torchrun restarts.
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
        """End the thread; after an `error` of the run, first look for the ranks that caused it.

        Returns:
            A sentence for each rank that is lost or failed before; empty without an error.
        """
        failures: list[str] = []
        if isinstance(error, RuntimeError):
            deadline = time.monotonic() + 4 * self._interval
            while not (failures := self._failed()) and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
            failures = failures or self._lost(list(self._peers), 3 * self._interval)
        text = None if error is None else f"{type(error).__name__}: {error}"
        with self._lock:
            self._publish(text if text and not failures else "left")
        if error is not None and self._rank == 0:
            time.sleep(2 * self._interval)  # the store may be in this process, and the others still read it
        self._stopped.set()
        self._thread.join(timeout=self._interval + 1)
        return failures

    def _failed(self) -> list[str]:
        """A sentence for each rank that published an error."""
        ends = [(peer["name"], peer["end"]) for peer in self._read(list(self._peers)).values()]
        return [f"{name} failed: {end}" for name, end in ends if end not in (None, "left")]

    def _lost(self, ranks: list[int], seconds: float) -> list[str]:
        """A sentence for each of `ranks` without a heartbeat for `seconds`."""
        now = time.monotonic()
        # A lost store, which is in the process of rank 0 or its torchrun, hides all heartbeats: report only rank 0.
        peers = [self._peers[rank] for rank in (ranks if self._connected else {0} & set(ranks))]
        ages = [(peer["name"], now - peer["since"]) for peer in peers if peer["end"] is None]
        return [f"{name} has sent no heartbeat for {age:.0f} s" for name, age in ages if age > seconds]

    def _beat(self) -> None:
        self._beats += 1
        self._publish(None)

    def _publish(self, end: str | None) -> None:
        self._end = end
        try:
            self._store.set(str(self._rank), json.dumps({"beat": self._beats, "name": self._name, "end": end}))
        except RuntimeError:
            self._connected = False

    def _read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """The state of all other ranks, that of `ranks` updated from the store."""
        with self._lock:
            for rank in ranks:
                try:
                    if not self._store.check([str(rank)]):
                        continue
                    state = json.loads(self._store.get(str(rank)))
                except RuntimeError:
                    self._connected = False
                    break
                peer = self._peers[rank]
                advanced = state["beat"] != peer["beat"]
                self._peers[rank] = {**state, "since": time.monotonic() if advanced else peer["since"]}
        return self._peers

    def _run(self) -> None:
        watched = [peer for peer in self._peers if self._rank == 0 or peer == 0]
        reported = False
        while not self._stopped.wait(self._interval):
            with self._lock:
                if self._end is None:
                    self._beat()
            self._read(watched)
            if self._end is None and not reported and (lost := self._lost(watched, 0.9 * self._timeout)):
                print("; ".join(lost), file=sys.stderr, flush=True)
                reported = True
            if self._lost(watched, self._timeout + 10):
                os._exit(EXIT_CODE)
