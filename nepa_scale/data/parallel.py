"""Work on many files by many processes, with progress."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

J = TypeVar("J")
R = TypeVar("R")


def in_parallel(
    work: Callable[[J], R], jobs: Sequence[J], workers: int, title: str, size: Callable[[J], float] = lambda _: 1.0
) -> list[R]:
    """`[work(job) for job in jobs]` by `workers` processes, with a progress bar on stderr that counts `size(job)`.

    work: a function of a module, as it is called in other processes

    Raises:
        Whatever `work` raises; RuntimeError where a process was killed.
    """
    sizes = [size(job) for job in jobs]
    results: list[Any] = [None] * len(jobs)
    with _progress() as progress:
        task = progress.add_task(title, total=sum(sizes))
        for number, result in _completed(work, jobs, min(workers, len(jobs))):
            results[number] = result
            progress.advance(task, sizes[number])
    return results


def _completed(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterable[tuple[int, R]]:
    if workers <= 1:
        for number, job in enumerate(jobs):
            yield number, work(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(work, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process was killed (out of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
