"""Runs jobs in this process, in worker processes, or on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Job = Callable[[], None]  # picklable; writes its result to disk


def run_jobs(jobs: Sequence[Job], *, workers: int, engine: str) -> Generator[int, None, None]:
    """Run jobs; yields the index of each job as it finishes, in any order. Closing the generator cancels the rest.

    Args:
        jobs: the jobs to run.
        workers: number of processes, 0 for one per core; with 1 the jobs run in this process, one after the other. For
            Ray, the maximum number of concurrent jobs, 0 for one per core of the cluster.
        engine: `processes` or `ray`.

    Raises:
        ValueError: a worker died, or `engine` is `ray` and Ray is not installed. An exception of a job is re-raised.
    """
    if engine == "ray":
        yield from _over_ray(jobs, workers)
        return
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        for number, job in enumerate(jobs):
            job()
            yield number
    else:
        yield from _over_processes(jobs, workers)


def _over_processes(jobs: Sequence[Job], workers: int) -> Iterator[int]:
    # The threads of pyarrow and tokenizers don't survive a fork: workers are forked from a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bert_fast.data.parts"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        numbers = {pool.submit(job): number for number, job in enumerate(jobs)}
        try:
            for done in as_completed(numbers):
                done.result()
                yield numbers[done]
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, possibly out of memory; finished parts are kept: run the same command again, "
                "with fewer workers or smaller part_bytes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _over_ray(jobs: Sequence[Job], workers: int) -> Generator[int, None, None]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(f"engine 'ray' needs the package {error.name}: pip install 'bert_fast[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Pickled, since the rows of Ray Data are Arrow rows.
    rows = [{"number": number, "job": pickle.dumps(job)} for number, job in enumerate(jobs)]
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in blocks.map(_run_row, compute=ray.data.TaskPoolStrategy(size=workers or None)).iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield int(row["number"])


def _run_row(row: dict[str, Any]) -> dict[str, Any]:
    """Run a job; its exception is returned, since Ray would wrap it in one of its own."""
    job: Job = pickle.loads(row["job"])
    try:
        job()
    except Exception as error:
        return {"number": row["number"], "error": pickle.dumps(error)}
    return {"number": row["number"], "error": b""}
