"""Training state cut at random, and real gloo processes that save and load it."""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nepa_scale.sharding.shard import Shard
from tests.training.warm_server import warm_processes

# sizes that divide by nothing, a scalar, and one that spans several blocks of a part file
SHAPES: dict[str, tuple[int, ...]] = {
    "backbone.embedding.weight": (37, 3, 7, 7),
    "backbone.norm.bias": (37,),
    "backbone.scale": (),
    "backbone.blocks.0.mlp.up.weight": (1031, 1033),
}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def whole_state(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, kinds: tuple[str, ...] = KINDS) -> list[Shard]:
    """All of every parameter; the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    state = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        tensors = {kind: torch.randn(size, generator=generator) for kind in kinds}
        state.append(Shard(name, shape, 0, size, tensors))
    return state


def cut(state: list[Shard], rank: int, world_size: int, seed: int) -> list[Shard]:
    """The part of `rank` where every parameter is cut at random places, the same on all ranks.

    Some parts are empty; of those, some have no `Shard` at all.
    """
    shared, own = random.Random(seed), random.Random(seed + rank)
    parts = []
    for shard in state:
        owner = shared.randrange(world_size)
        if shared.random() < 0.3:  # one rank has it all
            edges = [0] * (owner + 1) + [shard.stop] * (world_size - owner)
        else:
            edges = [0, *sorted(shared.randint(0, shard.stop) for _ in range(world_size - 1)), shard.stop]
        start, stop = edges[rank], edges[rank + 1]
        if stop > start or own.random() < 0.5:
            tensors = {kind: tensor[start:stop].clone() for kind, tensor in shard.tensors.items()}
            parts.append(Shard(shard.name, shard.shape, start, stop, tensors))
    return parts


def blank(shards: list[Shard]) -> list[Shard]:
    """The same ranges with nothing in them yet."""
    nan = float("nan")
    return [
        Shard(s.name, s.shape, s.start, s.stop, {kind: torch.full_like(t, nan) for kind, t in s.tensors.items()})
        for s in shards
    ]


def equal(left: list[Shard], right: list[Shard]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(
        (a.name, a.start, a.stop, a.tensors.keys()) == (b.name, b.start, b.stop, b.tensors.keys())
        and all(torch.equal(a.tensors[kind], b.tensors[kind]) for kind in a.tensors)
        for a, b in zip(left, right, strict=True)
    )


def run_ranks(world_size: int, target: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[int]:
    """Runs `target(rank, world_size, *arguments)` in processes of one group; their exit codes, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            warm_processes().Process(target=_run, args=(rank, world_size, folder, target, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        stuck = [process for process in ranks if process.exitcode is None]
        for process in stuck:
            process.kill()
            process.join()
        for path in sorted(Path(folder).glob("stderr_*")):
            print(path.read_text(), file=sys.stderr, end="")
        assert not stuck, f"{len(stuck)} ranks were still running after {timeout} s"
        return [process.exitcode or 0 for process in ranks]


def _run(rank: int, world_size: int, folder: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with open(f"{folder}/stderr_{rank}", "w") as errors:  # the server's own belongs to whichever test started it
        os.dup2(errors.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    with _group(rank, world_size, f"{folder}/store"):
        target(rank, world_size, *arguments)


@contextlib.contextmanager
def _group(rank: int, world_size: int, store: str) -> Iterator[None]:
    if world_size == 1:
        yield
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, to see that nothing has changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
