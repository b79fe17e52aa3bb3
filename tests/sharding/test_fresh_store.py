"""Ranks that are started again find each other in a store that remembers their dead predecessors."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from nepa_scale.config import ConfigError
from nepa_scale.sharding.fresh_store import fresh_store

PATIENCE = timedelta(seconds=10)


def live(store: dist.Store, size: int, late: int | None = None) -> list[dist.Store]:
    found: dict[int, dist.Store] = {}

    def join(rank: int) -> None:
        found[rank] = fresh_store(store, rank, size, PATIENCE)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(size) if rank != late]
    if late is not None:
        ranks.append(threading.Timer(0.3, join, args=(late,)))
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("late", [None, 0, 1])
def test_every_life_has_a_store_of_its_own(late: int | None) -> None:
    store = dist.HashStore()
    for life in range(3):
        ranks = live(store, 3, late if life else None)
        assert not ranks[1].check(["address"])
        ranks[0].set("address", str(life))
        assert [rank.get("address") for rank in ranks] == [str(life).encode()] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    live(store, 3)
    with pytest.raises(ConfigError, match="rank 1, 2 did not start"):
        fresh_store(store, 0, 3, timedelta(seconds=0.3))
