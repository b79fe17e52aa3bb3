"""All ranks stop after the same step, though a signal may reach only one of them, or each at another moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nepa_scale.sharding import World

_RANKS = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class StopRequest:
    """Signal `number` has reached `rank`."""

    number: int
    rank: int


class Stopped(Exception):
    """Raised out of an evaluation that was asked to stop, by all ranks at the same batch."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__()
        self.request = request


class Agreement:
    """Asks all ranks, during each step, whether any was told to stop.

    The question goes round on the host, in a group of its own, while the step computes: a rank waits only for one that
    is a whole step behind.

    asked: this rank's signal, or 0
    """

    def __init__(self, world: World, asked: Callable[[], int]) -> None:
        self._world, self._asked = world, asked
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._answer = torch.zeros((), dtype=torch.int64)
        self._pending: Any = None

    def begin(self) -> None:
        """Starts to ask. Collective."""
        number = self._asked()
        self._answer.fill_(number * _RANKS + self._world.rank if number else 0)
        if self._group is not None:
            self._pending = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish(self) -> StopRequest | None:
        """The answer to the question that `begin` started, the same on all ranks."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        number, rank = divmod(int(self._answer), _RANKS)
        return StopRequest(number, rank) if number else None

    def watched(self, items: Iterable[T], progress: Callable[[], None]) -> Iterator[T]:
        """`items`, of which all ranks have equally many, with the question asked before each.

        progress: called for each item
        Raises:
            Stopped: some rank was told to stop.
        """
        for item in items:
            progress()
            self.begin()
            request = self.finish()
            if request is not None:
                raise Stopped(request)
            yield item
