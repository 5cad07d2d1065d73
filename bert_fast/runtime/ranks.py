"""The processes of a run: who this one is, and what they tell each other. One alone has no one to tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_fast.pretrain.guard import TrainingDivergedError
from bert_fast.pretrain.setup import resolve_device
from bert_fast.runtime.heartbeat import Heartbeat

Value = TypeVar("Value")


class RankError(RuntimeError):
    """Another rank failed; the message names it and says why."""


class Ranks(AbstractContextManager["Ranks"]):
    """This process among those that torchrun started, or alone.

    Args:
        device: "auto", "cpu", "cuda", ...; under torchrun each rank takes the CUDA device of its local rank.
        timeout: seconds after which a rank that does not answer ends the run.

    Attributes:
        rank, world: number of this process, and of all.
        main: whether this is rank 0, which logs and writes.
        device: where it computes.
    """

    def __init__(self, device: str = "auto", timeout: float = 600.0) -> None:
        self.launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank, self.world = 0, 1
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
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        # Ranks that torchrun started again would find each other's old addresses in its store.
        store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # What steers the run has a group of its own on the CPU: it never waits for the device.
        self._control = dist.new_group(backend="gloo", timeout=limit)
        if self.world > 1:
            self._heartbeat = Heartbeat(self.rank, self.world, timeout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the group. After an error of a collective the message names the ranks whose fault it is."""
        if not self.launched:
            return
        if error is None:
            self._settle()
        told = isinstance(error, (RankError, TrainingDivergedError))
        blamed = self._heartbeat.stop(None if told else error) if self._heartbeat else []
        if blamed:
            raise RankError(f"the run ended: {'; '.join(blamed)}") from error
        if error is None:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, in place; nothing is waited for on a GPU."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agreed(self, value: int | None) -> int | None:
        """The largest value that any rank gave, or None where none gave one.

        Of several ranks the answer is that of the call before, so that nobody waits.
        """
        if self.world == 1:
            return value
        before = self._settle()
        mine = torch.tensor([value or 0])
        self._pending = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._control, async_op=True)
        return before

    def _settle(self) -> int | None:
        if self._pending is None:
            return None
        (found, work), self._pending = self._pending, None
        work.wait()
        return int(found) or None

    def first(self, action: Callable[[], Value]) -> Value:
        """What `action` returns on rank 0, which alone runs it, on every rank.

        Raises:
            RankError: on the others, where it failed on rank 0; there its own error.
        """
        told: list[Any] = [None, None]
        failed: Exception | None = None
        if self.main:
            try:
                told[0] = action()
            except Exception as error:
                failed, told[1] = error, _described(error)
        if self.world > 1:
            dist.broadcast_object_list(told, src=0, group=self._control)
        if failed is not None:
            raise failed
        if told[1] is not None:
            raise RankError(f"rank 0 failed: {told[1]}")
        value: Value = told[0]
        return value

    def together(self, action: Callable[[], Value]) -> Value:
        """What `action` returns on each rank, once all of them have run it.

        Raises:
            RankError: where it failed on another rank only; each rank on which it failed raises its own error.
        """
        failed: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failed = error
        said: list[str | None] = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(said, None if failed is None else _described(failed), group=self._control)
        if failed is not None:
            raise failed
        for rank, text in enumerate(said):
            if text is not None:
                raise RankError(f"rank {rank} failed: {text}")
        return result


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
