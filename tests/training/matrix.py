"""Can every strategy at every world size go on from what every other one saved?

    python tests/training/matrix.py                              measures all cells and prints the table
    python tests/training/matrix.py --output docs/checkpoints.md     (make matrix) writes it between its markers

{single, ddp, fsdp, zero1, zero2, zero3, zero3_offload} on 1, 2 and 4 ranks, as writer and as reader, in fp32 on CPUs.
A writer trains STEPS steps, saves, and trains AFTER more. A reader loads that, compares each element that it holds
(masters, both moments, moving average) with a copy of the writer's that no checkpoint code has touched, and trains
AFTER steps whose losses it compares with the writer's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initial_values, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding import (
    StepSettings,
    Strategy,
    World,
    build_strategy,
    choose_strategy,
    join_world,
    leave_world,
    mean_over_ranks,
)
from nepa_scale.sharding.ds_config import DS_CONFIGS
from nepa_scale.training.checkpoint import Checkpointer, find_checkpoint, load_shards, read_meta
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.optimization import pretraining_groups
from tests.training.checkpoint_ranks import run_ranks

STEPS, AFTER, BATCH, LR = 3, 5, 4, 3e-4
TOLERANCE = 1e-6  # of a loss, relative
STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
WORLDS = (1, 2, 4)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
# rows of the MLP that 2 and 4 ranks do not divide, and flat buffers that end within parameters
ARCHITECTURE = resolve_architecture(
    ModelConfig(
        width=36, depth=2, heads=3, mlp_width=37, mlp="swiglu", patch_size=8, image_size=16, qk_norm="affine",
        layer_scale=0.3, drop_path=0.1,
    )
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Layout:
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}@{self.ranks}"


LAYOUTS = [Layout(s, n) for s, n in itertools.product(STRATEGIES, WORLDS) if s != "single" or n == 1]
Pair = tuple[Layout, Layout]


def build(layout: Layout, world: World) -> tuple[Strategy, MovingAverage]:
    """The layout's strategy with its moving average, not yet filled."""
    path = DS_CONFIGS / f"{layout.strategy}.json"
    offload = path if layout.strategy == "zero3_offload" else None
    name, values = choose_strategy("auto" if offload else layout.strategy, offload, world.size)
    settings = StepSettings("fp32", BATCH // world.size, 1, 0.05, (0.9, 0.95), 1e-8, "none", compile=False)
    strategy = build_strategy(
        name,
        values,
        world,
        lambda: NextEmbedding(CausalViT(ARCHITECTURE, torch.float32), ObjectiveConfig(mask_ratio=0.0)),
        lambda names: pretraining_groups(names, 0.05),
        settings,
    )
    return strategy, MovingAverage(strategy.shards)


def images(step: int) -> Tensor:
    """The global batch of a step, [BATCH, 3, 16, 16]: tinted, so that the loss is not near 0, where a relative
    difference means nothing."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(BATCH, 3, 4, 4, generator=generator) * 2 - 1
    tint = 1 + 2 * torch.rand(BATCH, 3, 1, 1, generator=generator)
    return F.interpolate(coarse, (16, 16), mode="bilinear") + tint


def train(strategy: Strategy, average: MovingAverage, steps: Iterable[int]) -> list[float]:
    """Trains these steps; the losses of the global batch."""
    world, losses = strategy.world, []
    for step in steps:
        mine = images(step).chunk(world.size)[world.rank]
        keys = (torch.arange(BATCH) + step * BATCH).chunk(world.size)[world.rank]
        loss = strategy.forward_backward({"images": mine, "sample_keys": keys}, 0)["loss"]
        strategy.step(LR)
        average.update(torch.tensor(False), 0.9)
        losses.append(mean_over_ranks({"loss": loss})["loss"])
    return losses


# in the ranks


def enter(rank: int, world_size: int) -> World:
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return join_world()


def write(rank: int, world_size: int, folder: str, layouts: list[Layout]) -> None:
    """Trains, saves, and trains on, by each of `layouts`, all of this world size."""
    world = enter(rank, world_size)
    for layout in layouts:
        run = Path(folder) / str(layout)
        strategy, average = build(layout, world)
        for shard in strategy.shards:
            whole = initial_values(shard.name, shard.shape, ARCHITECTURE, seed=0).flatten()
            shard.tensors["master"].copy_(whole[shard.start : shard.stop])
        strategy.refresh()
        average.restart()
        train(strategy, average, range(STEPS))
        checkpointer = Checkpointer(run, keep=1, rank=rank, world_size=world_size, stop_on_failure=True)
        meta = {"optimizer_steps": strategy.optimizer_steps()}
        checkpointer.save(STEPS, strategy.shards, replicated=strategy.replicated, meta=meta)
        checkpointer.wait()
        checkpointer.close()
        held = [
            (s.name, s.start, {kind: tensor.clone() for kind, tensor in s.tensors.items()}) for s in strategy.shards
        ]
        torch.save(held, run / f"held_{rank}.pt")
        losses = train(strategy, average, range(STEPS, STEPS + AFTER))
        if world.is_main:
            (run / "losses.json").write_text(json.dumps(losses))
        strategy.close()
    if world_size == 1:
        leave_world()


def read(rank: int, world_size: int, folder: str, pairs: list[Pair]) -> None:
    """Goes on from each writer of `pairs` by its reader, all of this world size; the main rank writes the rows."""
    world, rows = enter(rank, world_size), []
    for layout, some in itertools.groupby(sorted(pairs, key=lambda pair: pair[1]), key=lambda pair: pair[1]):
        strategy, average = build(layout, world)
        for writer, _ in some:
            rows.append(
                {"writer": str(writer), "reader": str(layout)} | go_on(strategy, average, Path(folder) / str(writer))
            )
        strategy.close()
    if rank == 0:
        (Path(folder) / f"rows_{world_size}.json").write_text(json.dumps(rows))
    if world_size == 1:
        leave_world()


def go_on(strategy: Strategy, average: MovingAverage, run: Path) -> dict[str, Any]:
    """How what this strategy loads and makes of a writer's checkpoint compares with the writer's own."""
    for shard in strategy.shards:
        for kind in KINDS:
            shard.tensors[kind].fill_(float("nan"))
    path = find_checkpoint(run, "auto")
    assert path is not None
    load_shards(path, strategy.shards)
    strategy.set_optimizer_steps(read_meta(path)["optimizer_steps"])
    strategy.refresh()
    equal = torch.tensor(float(holds_the_same(strategy, run) and strategy.optimizer_steps() == STEPS))
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    losses = train(strategy, average, range(STEPS, STEPS + AFTER))
    expected = json.loads((run / "losses.json").read_text())
    return {"equal": bool(equal), "difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))}


def holds_the_same(strategy: Strategy, run: Path) -> bool:
    """Whether each element of this rank is, bit for bit, that of whichever rank of the writer held it."""
    whole = {(s.name, kind): torch.full((s.stop - s.start,), float("nan")) for s in strategy.shards for kind in KINDS}
    starts = {s.name: (s.start, s.stop) for s in strategy.shards}
    for path in run.glob("held_*.pt"):
        for name, start, tensors in torch.load(path, weights_only=True):
            low, high = starts.get(name, (0, 0))
            for kind, tensor in tensors.items():
                begin, end = max(low, start), min(high, start + tensor.numel())
                if begin < end:
                    whole[name, kind][begin - low : end - low] = tensor[begin - start : end - start]
    return all(torch.equal(s.tensors[kind], whole[s.name, kind]) for s in strategy.shards for kind in KINDS)


# outside


def measure(pairs: list[Pair], *, show: bool = False) -> list[dict[str, Any]]:
    """One row a pair: writer, reader, whether all state was bit-equal, and the largest relative loss difference."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True), disable=not show) as bar,
    ):
        task = bar.add_task("launches", total=2 * len(WORLDS))
        for ranks in WORLDS:
            layouts = sorted({writer for writer, _ in pairs if writer.ranks == ranks})
            assert run_ranks(ranks, write, folder, layouts, timeout=1200) == [0] * ranks
            bar.advance(task)
        rows = []
        for ranks in WORLDS:
            some = [pair for pair in pairs if pair[1].ranks == ranks]
            assert run_ranks(ranks, read, folder, some, timeout=3000) == [0] * ranks
            rows += json.loads((Path(folder) / f"rows_{ranks}.json").read_text())
            bar.advance(task)
    return rows


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that break the promise."""
    return [
        row
        for row in rows
        if not row["equal"] or not row["difference"] <= (0.0 if row["writer"] == row["reader"] else TOLERANCE)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/checkpoints.md: one line a writer, one column a reader."""
    found = {(row["writer"], row["reader"]): row for row in rows}
    names = [str(layout) for layout in LAYOUTS]
    equal = sum(row["equal"] for row in rows)
    exact = sum(row["difference"] == 0.0 for row in rows)
    worst = max(row["difference"] for row in rows)
    lines = [
        f"Measured by `make matrix`: {len(rows)} pairs of a writer (rows) and a reader (columns; `@` the number of "
        f"ranks), fp32 on CPUs, torch {torch.__version__.split('+')[0]}, a model with sizes that do not divide. "
        f"Masters, both moments and moving average after loading: equal bit for bit in {equal} of {len(rows)}. The "
        f"entries are the largest relative difference of the next {AFTER} losses from the writer's own: at most "
        f"{worst:.1e}, and 0 in {exact}, among them all in which writer and reader are the same.",
        "",
        "| writer | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for writer in names:
        entries = []
        for reader in names:
            row = found[writer, reader]
            entries.append(
                ("0" if row["difference"] == 0 else f"{row['difference']:.0e}")
                + ("" if row["equal"] else " **differs**")
            )
        lines.append(f"| {writer} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file in which to replace the table between its markers")
    arguments = parser.parse_args()
    rows = measure(list(itertools.product(LAYOUTS, LAYOUTS)), show=True)
    text = table(rows)
    if arguments.output:
        before, _, rest = arguments.output.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.output.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    else:
        print(text)
    for row in failures(rows):
        print(f"broken: {row}", file=sys.stderr)
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    from tests.training import matrix  # as the module that the ranks know, not as __main__

    sys.exit(matrix.main())
