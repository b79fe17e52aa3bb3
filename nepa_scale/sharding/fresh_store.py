"""A part of torchrun's store that no earlier life of the job has written to.

With `--max-restarts` the agent's store outlives the ranks, and with it the addresses of processes that are dead: a rank
that reads one of those before its new owner has replaced it never reaches it. The agents do not tell the ranks which
life it is, so rank 0 makes up a name for it, and gives it to those that ask for it in this life.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from nepa_scale.config import ConfigError

_POLL_SECONDS = 0.02


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """`store`, seen through a prefix that is new and the same on all ranks. Collective.

    Raises:
        ConfigError: a rank has not come within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    life = _welcome(store, size, deadline) if rank == 0 else _ask(store, rank, deadline)
    return dist.PrefixStore(life, store)


def _ask(store: dist.Store, rank: int, deadline: float) -> str:
    nonce = uuid.uuid4().hex  # an answer to an earlier life is not taken for one's own
    store.set(f"asks/{rank}", nonce)
    answer = f"answer/{rank}/{nonce}"
    while not store.check([answer]):
        _wait(deadline, "rank 0")
    life = store.get(answer).decode()
    store.set(f"thanks/{rank}/{life}", "")
    return life


def _welcome(store: dist.Store, size: int, deadline: float) -> str:
    life = uuid.uuid4().hex
    absent = set(range(1, size))
    while absent:
        for rank in sorted(absent):
            if store.check([f"asks/{rank}"]):  # perhaps one that is dead: then it never thanks
                store.set(f"answer/{rank}/{store.get(f'asks/{rank}').decode()}", life)
        absent = {rank for rank in absent if not store.check([f"thanks/{rank}/{life}"])}
        if absent:
            _wait(deadline, f"rank {', '.join(map(str, sorted(absent)))}")
    return life


def _wait(deadline: float, who: str) -> None:
    if time.monotonic() > deadline:
        raise ConfigError(f"{who} did not start within train.timeout: look at its output, or raise the timeout")
    time.sleep(_POLL_SECONDS)
