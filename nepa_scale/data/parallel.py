"""Work on many files by many processes or threads, with progress."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn

J = TypeVar("J")
R = TypeVar("R")

LINE_EVERY = 10.0  # seconds between lines where stderr is a file
_THREADS = 8  # for work that waits for disks and servers


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    work: Callable[[J], R],
    jobs: Sequence[J],
    workers: int,
    title: str,
    size: Callable[[J], float] = lambda _: 1.0,
) -> list[R]:
    """`[work(job) for job in jobs]` by `workers` processes, with progress on stderr that counts `size(job)`.

    work: a function of a module, as it is called in other processes. They come from a fork server: a program that has
        it preload that module first imports it once, not for each worker

    Raises:
        Whatever `work` raises; RuntimeError where a process was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        return _collect(((number, work(job)) for number, job in enumerate(jobs)), jobs, title, size)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_prepare_worker) as pool:
        try:
            return _collect(_completed(pool, work, jobs), jobs, title, size)
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process was killed (out of memory?): try fewer workers") from error


def in_threads(work: Callable[[J], R], jobs: Sequence[J], title: str) -> list[R]:
    """`[work(job) for job in jobs]` by a few threads, with progress on stderr."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return _collect(_completed(pool, work, jobs), jobs, title, lambda _: 1.0)


def _completed(pool: Executor, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
    futures = {pool.submit(work, job): number for number, job in enumerate(jobs)}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(results: Iterator[tuple[int, R]], jobs: Sequence[J], title: str, size: Callable[[J], float]) -> list[R]:
    sizes = [size(job) for job in jobs]
    collected: list[Any] = [None] * len(jobs)
    with _Report(title, sum(sizes)) as report:
        for number, result in results:
            collected[number] = result
            report.advance(sizes[number])
    return collected


def _prepare_worker() -> None:
    """One thread for each worker, and an end with the parent: else a worker whose parent was killed waits for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.speed:,.0f}/s" if task.speed else ""


class _Report:
    """A bar on a terminal, a line now and then elsewhere, and nothing for what takes a moment."""

    def __init__(self, title: str, total: float) -> None:
        self._title, self._total, self._done = title, max(total, 1), 0.0
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=self._total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float) -> None:
        """Counts `amount` more as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.advance(self._task, amount)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY and self._done:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(f"{self._title}: {self._done / self._total:.0%}, {rate:,.0f}/s, {left:.0f} s left", file=sys.stderr)
