"""The processes of a run: ranks, their control-plane collectives, the signals that stop them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_fast._device import resolve_device
from bert_fast.runtime.heartbeat import Heartbeat

Value = TypeVar("Value")


class RankError(RuntimeError):
    """Another rank failed; the message has its number and its error."""


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite, or the loss exploded; all ranks raise it in the same step."""


class Ranks(AbstractContextManager["Ranks"]):
    """This process and the other ranks that torchrun started; a process of its own without torchrun.

    Args:
        device: "auto", "cpu", "cuda", ...; under torchrun each rank takes the CUDA device of its local rank.
        timeout: seconds without an answer from a rank after which the run ends.

    Attributes:
        rank, world_size: as in torch.distributed; 0 and 1 without torchrun.
        main: whether this is rank 0, which logs and writes.
        device: the device of this rank.
        restarted: whether torchrun has started the ranks again after a failure.
    """

    def __init__(self, device: str = "auto", timeout: float = 600.0) -> None:
        self.launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
        self.rank, self.world_size = 0, 1
        self.device = resolve_device(device)
        self._heartbeat: Heartbeat | None = None
        self._pending: tuple[Tensor, Any] | None = None
        if self.launched:
            self._join(timeout)
        self.main = self.rank == 0

    def _join(self, timeout: float) -> None:
        if self.device.type == "cuda":
            self.device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        # Without a prefix, ranks that torchrun restarted would read each other's old addresses from its store.
        store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Control-plane collectives have a group of their own on the CPU and never synchronize with the device.
        self._control = dist.new_group(backend="gloo", timeout=limit)
        if self.world_size > 1:
            self._heartbeat = Heartbeat(self.rank, self.world_size, timeout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the process group.

        Raises:
            RankError: a collective failed because of other ranks; the message names them.
        """
        if not self.launched:
            return
        if error is None:
            self._wait_pending()
        on_every_rank = isinstance(error, (RankError, TrainingDivergedError))
        failures = self._heartbeat.stop(None if on_every_rank else error) if self._heartbeat else []
        if failures:
            raise RankError(f"the run ended: {'; '.join(failures)}") from error
        if error is None:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce `values` to their sum over the ranks, in place; does not synchronize with a GPU."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def async_max(self, value: int | None) -> int | None:
        """The maximum of the ranks' values, or None if every rank passed None.

        With several ranks, starts an asynchronous all-reduce and returns the result of the previous call, so that no
        rank waits.
        """
        if self.world_size == 1:
            return value
        previous = self._wait_pending()
        maximum = torch.tensor([value or 0])
        self._pending = maximum, dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self._control, async_op=True)
        return previous

    def _wait_pending(self) -> int | None:
        if self._pending is None:
            return None
        (maximum, work), self._pending = self._pending, None
        work.wait()
        return int(maximum) or None

    def on_rank0(self, action: Callable[[], Value]) -> Value:
        """Call `action` on rank 0 alone and return its result on every rank.

        Raises:
            RankError: on the other ranks, if it raised on rank 0, where its own exception is raised.
        """
        message: list[Any] = [None, None]  # result, error
        failure: Exception | None = None
        if self.main:
            try:
                message[0] = action()
            except Exception as error:
                failure, message[1] = error, _described(error)
        if self.world_size > 1:
            dist.broadcast_object_list(message, src=0, group=self._control)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise RankError(f"rank 0 failed: {message[1]}")
        value: Value = message[0]
        return value

    def on_all_ranks(self, action: Callable[[], Value]) -> Value:
        """Call `action` on every rank, wait for all of them, and return this rank's result.

        Raises:
            RankError: `action` raised on another rank only; a rank on which it raised raises that exception.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        errors: list[str | None] = [None] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(errors, None if failure is None else _described(failure), group=self._control)
        if failure is not None:
            raise failure
        for rank, text in enumerate(errors):
            if text is not None:
                raise RankError(f"rank {rank} failed: {text}")
        return result


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def stop_signals(*, repeated: bool = False) -> Iterator[Callable[[], int | None]]:
    """In the block, the first SIGTERM or SIGINT only sets what the yielded function returns; a second acts as usual.

    The loop can thus finish its step. A signal that is ignored (by nohup, or in the background of a script) or handled
    outside Python stays so. Outside the main thread, where handlers can't be set, the function always returns None.

    Args:
        repeated: ignore a second signal too: under torchrun the sender's signal reaches the whole process group, and
            torchrun sends it again.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    previous = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def handle(number: int, _: object) -> None:
        received.append(number)
        if not repeated:
            signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
