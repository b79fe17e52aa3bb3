"""Processes that start once, fill batches in shared memory, and hand them back in order."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Generic, Protocol, TypeVar

import torch

from nepa_scale.data.shared_slots import Pixels, SharedSlots

AHEAD = 2  # batches that each worker fills while an earlier one is in use
_IN_USE = 3  # batches that the reader of the stream may hold without their being copied: one more than a plain loop

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Filler(Protocol[R_co]):
    """Picklable: goes to each worker once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays that `fill` fills."""

    def fill(self, number: int, pixels: Pixels) -> R_co:
        """Fills the pixels of batch `number` and returns the rest of it, which must be picklable and small."""


class WorkerDied(RuntimeError):
    """A worker process ended without being asked to."""


class Workers(Generic[R]):
    """An iterator over the filled pixels, and what `fill` returned beside them, of the batches `numbers`, in order.

    Batches are dealt to the workers in turn. The processes come from a fork server: to fork the training process
    itself, with its threads and its CUDA context, could leave a worker waiting for a lock that nobody holds. A program
    that calls `multiprocessing.set_forkserver_preload(["nepa_scale.data"])` first pays for the imports once, not for
    each worker. Workers end with this process, however it ends.
    """

    def __init__(self, filler: Filler[R], numbers: Iterator[int], count: int) -> None:
        self._numbers = numbers
        self._slots = SharedSlots(count * AHEAD + _IN_USE, filler.shape)
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection[tuple[int, int], R | RuntimeError]] = []
        self._end = util.Finalize(self, _end, (self._processes, self._connections), exitpriority=10)
        context = multiprocessing.get_context("forkserver")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(filler, self._slots, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen when the worker dies
            self._processes.append(process)
            self._connections.append(ours)
        self._asked: list[list[int]] = [[] for _ in range(count)]  # slots under way, in order
        self._turn = 0
        for worker in list(range(count)) * AHEAD:
            self._ask(worker, self._slots.take())

    def __iter__(self) -> Iterator[tuple[Pixels, R]]:
        return self

    def __next__(self) -> tuple[Pixels, R]:
        """
        Raises:
            WorkerDied: killed, for instance for its memory.
            RuntimeError: `fill` raised; holds the worker's traceback.
        """
        if not self._processes or not self._asked[self._turn]:
            self.close()
            raise StopIteration
        worker, slot = self._turn, self._asked[self._turn].pop(0)
        self._turn = (worker + 1) % len(self._processes)
        rest = self._answer(worker)
        if isinstance(rest, RuntimeError):
            raise rest
        spare = self._slots.take()
        if spare is None:  # the stream's reader keeps batches: give it copies
            pixels = self._slots.array(slot).copy()
            self._ask(worker, slot)
        else:
            pixels = self._slots.lend(slot)
            self._ask(worker, spare)
        return pixels, rest

    def close(self) -> None:
        """Ends the processes at once; batches that were handed out stay valid."""
        self._end()

    def _ask(self, worker: int, slot: int | None) -> None:
        number = next(self._numbers, None)
        if number is None or slot is None:
            return
        with contextlib.suppress(OSError):  # it died: `_answer` says so
            self._connections[worker].send((number, slot))
        self._asked[worker].append(slot)

    def _answer(self, worker: int) -> R | RuntimeError:
        try:
            return self._connections[worker].recv()
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join(5)
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited: {code}"
            raise WorkerDied(f"worker {worker} {how}") from None


def _end(processes: list[ForkServerProcess], connections: list[Connection[tuple[int, int], object]]) -> None:
    for process in processes:
        process.kill()  # it holds nothing that needs an orderly end
    for process in processes:
        process.join()
    for connection in connections:
        connection.close()
    processes.clear()
    connections.clear()


def _work(filler: Filler[R], slots: SharedSlots, connection: Connection[R | RuntimeError, tuple[int, int]]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach all processes; what ends the training process ends this one
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not searched for garbage
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata
    with contextlib.suppress(EOFError, OSError):  # the training process has ended
        while True:
            batch, slot = connection.recv()
            connection.send(_guarded(filler, batch, slots.array(slot)))


def _guarded(filler: Filler[R], number: int, pixels: Pixels) -> R | RuntimeError:
    try:
        return filler.fill(number, pixels)
    except Exception:
        return RuntimeError(f"in a data worker:\n{traceback.format_exc()}")
