"""Do all strategies train the same model? Every cell of the matrix, 20 steps, against one process.

    python tests/sharding/parity.py --output docs/parity.md      (also: make parity)

The table is of next-embedding prediction; tests measure some cells of the other objectives, too.

{ddp, fsdp, zero1, zero2, zero3} on 2 ranks and `single`, x {fp32, bf16} x recompute {none, selective, full} x
accumulation {1, 2}. Each rank has its own half of the global batch; the gradient is clipped in every step. The
reference of a cell is the single process in the same precision, on the whole batch at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initial_values, resolve_architecture
from nepa_scale.objectives import build_pretext, needs_teacher
from nepa_scale.sharding import (
    StepSettings,
    World,
    build_strategy,
    choose_strategy,
    join_world,
    leave_world,
    mean_over_ranks,
)
from nepa_scale.training.departure import depart
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.optimization import pretraining_groups
from nepa_scale.training.schedule import Schedule
from nepa_scale.training.teacher import Teacher

STEPS, BATCH, CLIP = 20, 8, 0.05
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # largest relative difference of a loss
PRECISIONS, RECOMPUTE, ACCUMULATION = ("fp32", "bf16"), ("none", "selective", "full"), (1, 2)
RANKS = min(2, torch.cuda.device_count() or 2)
SHARDED = ("ddp", "fsdp", "zero1", "zero2", "zero3")
Cell = tuple[str, str, str, int, str]  # strategy, precision, recompute, accumulation, objective
# widths and row counts that 2 ranks do not divide evenly, and LayerScale large enough to show a mistake
ARCHITECTURE = resolve_architecture(
    ModelConfig(
        width=60, depth=3, heads=3, mlp_width=101, mlp="swiglu", patch_size=8, image_size=32, qk_norm="affine",
        layer_scale=0.3, drop_path=0.1,
    )
)  # fmt: skip

SIDES = {"next_embedding": 32, "mae": 48, "jepa": 48}  # of the images; jepa finds no blocks in 4 x 4 patches
# rates at which 20 steps are smooth: where a loss jumps about, rounding grows to any size
LRS = {"next_embedding": 2e-3, "mae": 2e-4, "jepa": 1e-3}
DECAY_END = {"jepa": 4.0}  # of a weight decay that grows, so much that the losses show it


def images(step: int, side: int) -> Tensor:
    """The global batch of a step, [BATCH, 3, side, side]: smooth, so that there is something to predict."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(BATCH, 3, 4, 4, generator=generator) * 2 - 1
    tint = torch.rand(BATCH, 3, 1, 1, generator=generator)
    return F.interpolate(coarse, (side, side), mode="bilinear") + tint


def run_cell(cell: Cell, world: World) -> dict[str, list[float]]:
    """Losses (mean over the global batch) and gradient norms of STEPS steps."""
    strategy, precision, recompute, accumulation, objective = cell
    side = SIDES[objective]
    architecture = dataclasses.replace(ARCHITECTURE, image_size=(side, side))
    name, values = choose_strategy(strategy, None, world.size)
    micro = BATCH // world.size // accumulation
    settings = StepSettings(precision, micro, accumulation, CLIP, (0.9, 0.95), 1e-8, recompute, compile=False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    built = build_strategy(
        name,
        values,
        world,
        lambda: build_pretext(CausalViT(architecture, dtype), ObjectiveConfig(name=objective)),
        lambda names: pretraining_groups(names, 0.05, weight_decay_end=DECAY_END.get(objective)),
        settings,
    )
    for shard in built.shards:
        whole = initial_values(shard.name, shard.shape, architecture, seed=0).flatten()
        shard.tensors["master"].copy_(whole[shard.start : shard.stop])
    built.refresh()
    average = MovingAverage(built.shards) if needs_teacher(ObjectiveConfig(name=objective)) else None
    teacher = Teacher(built, average) if average else None
    lr = LRS[objective]
    schedule = Schedule(STEPS, 0, lr, 1.0, STEPS, ema_decay=0.9, ema_decay_end=1.0)
    rope_scale = torch.ones((), device=world.device)
    losses, norms = [], []
    for step in range(STEPS):
        mine = images(step, side).chunk(world.size)[world.rank].chunk(accumulation)
        keys = (torch.arange(BATCH) + step * BATCH).chunk(world.size)[world.rank].chunk(accumulation)
        total = torch.zeros((), device=world.device)
        for micro_step, (x, k) in enumerate(zip(mine, keys, strict=True)):
            inputs = {"images": x.to(world.device), "sample_keys": k.to(world.device), "rope_scale": rope_scale}
            if teacher is not None:
                inputs = teacher.teach(inputs)
            total += built.forward_backward(inputs, micro_step)["loss"] / accumulation
        norm = built.step(lr, weight_decay=schedule.weight_decays(step, built.groups))
        found = mean_over_ranks({"loss": total, "norm": norm})
        if average is not None:
            average.update(torch.zeros((), dtype=torch.bool, device=world.device), schedule.average_decay(step))
        losses.append(found["loss"])
        norms.append(found["norm"])
    built.close()
    return {"losses": losses, "norms": norms}


def worker(output: Path, names: list[str]) -> None:
    """Runs the named cells on this rank; the main rank writes them."""
    world = join_world()
    cells = {}
    for name in names:
        strategy, precision, recompute, accumulation, objective = name.split("/")
        cells[name] = run_cell((strategy, precision, recompute, int(accumulation), objective), world)
    if world.is_main:
        output.write_text(json.dumps(cells))
    leave_world()
    depart(0)


def launch(cells: Iterable[Cell], ranks: int) -> dict[Cell, dict[str, list[float]]]:
    """The cells, measured in one launch of `ranks` processes."""
    names = {"/".join(map(str, cell)): cell for cell in cells}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cells.json"
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        subprocess.run(
            [*command, __file__, "--worker", str(output), "--cells", *names],
            env=environment, check=True, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        return {names[name]: found for name, found in json.loads(output.read_text()).items()}


def measure() -> list[dict[str, Any]]:
    """One row a cell: its names, largest relative loss difference, and the gradient norms' smallest and largest."""
    switches = tuple(product(PRECISIONS, RECOMPUTE, ACCUMULATION, ("next_embedding",)))
    cells = launch([("single", *some) for some in switches], 1)
    cells |= launch([(strategy, *some) for strategy, some in product(SHARDED, switches)], RANKS)
    rows = []
    for (strategy, precision, recompute, accumulation, objective), cell in cells.items():
        reference = cells["single", precision, "none", 1, objective]["losses"]
        worst = max(abs(a - b) / abs(b) for a, b in zip(cell["losses"], reference, strict=True))
        rows.append(
            {
                "strategy": strategy,
                "precision": precision,
                "recompute": recompute,
                "accumulation": accumulation,
                "difference": worst,
                "smallest_norm": min(cell["norms"]),
                "losses": cell["losses"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """docs/parity.md."""
    columns = list(product(PRECISIONS, RECOMPUTE, ACCUMULATION))
    by_cell = {(r["strategy"], r["precision"], r["recompute"], r["accumulation"]): r for r in rows}
    first, last = (by_cell["single", "fp32", "none", 1]["losses"][i] for i in (0, -1))
    lines = [
        "# Parity of the strategies",
        "",
        "Generated by `make parity`. Largest relative difference of the loss over "
        f"{STEPS} steps between each cell on {RANKS} ranks (`single`: one process) and one process in the same "
        "precision that takes the global batch at once, without recomputation. Every rank has "
        f"different images; the gradient is clipped in every step (norms of at least "
        f"{min(r['smallest_norm'] for r in rows):.3f} against a limit of {CLIP}); drop path is on; the loss goes from "
        f"{first:.4f} to {last:.4f}. torch {torch.__version__.split('+')[0]} on "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}.",
        "",
        f"Tolerances, which the suite holds: fp32 {TOLERANCE['fp32']:g}, bf16 {TOLERANCE['bf16']:g}.",
        "",
    ]
    for precision in PRECISIONS:
        some = [c for c in columns if c[0] == precision]
        lines.append(f"## {precision}\n")
        lines.append("| strategy | " + " | ".join(f"{r}, accumulation {a}" for _, r, a in some) + " |")
        lines.append("|---" * (len(some) + 1) + "|")
        for strategy in ("single", *SHARDED):
            cells = [f"{by_cell[(strategy, *c)]['difference']:.1e}" for c in some]
            lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.cells)
        return
    text = table(measure())
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
