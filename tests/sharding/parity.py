"""Do all strategies train the same model? Every cell of the matrix, 20 steps, against one process.

    python tests/sharding/parity.py --output docs/parity.md      (also: make parity)

{ddp, fsdp, zero1, zero2, zero3} on 2 ranks and `single`, x {fp32, bf16} x recompute {none, selective, full} x
accumulation {1, 2}. Each rank has its own half of the global batch; the gradient is clipped in every step. The
reference of a cell is the single process in the same precision, on the whole batch at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initial_values, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding import (
    StepSettings,
    World,
    build_strategy,
    choose_strategy,
    join_world,
    leave_world,
    mean_over_ranks,
)
from nepa_scale.training.optimization import pretraining_groups

STEPS, BATCH, CLIP, LR = 20, 8, 0.05, 2e-3
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # largest relative difference of a loss
PRECISIONS, RECOMPUTE, ACCUMULATION = ("fp32", "bf16"), ("none", "selective", "full"), (1, 2)
RANKS = min(2, torch.cuda.device_count() or 2)
SHARDED = ("ddp", "fsdp", "zero1", "zero2", "zero3")
# widths and row counts that 2 ranks do not divide evenly, and LayerScale large enough to show a mistake
ARCHITECTURE = resolve_architecture(
    ModelConfig(
        width=60, depth=3, heads=3, mlp_width=101, mlp="swiglu", patch_size=8, image_size=32, qk_norm="affine",
        layer_scale=0.3, drop_path=0.1,
    )
)  # fmt: skip


def images(step: int) -> Tensor:
    """The global batch of a step, [BATCH, 3, 32, 32]: smooth, so that there is something to predict."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(BATCH, 3, 4, 4, generator=generator) * 2 - 1
    tint = torch.rand(BATCH, 3, 1, 1, generator=generator)
    return F.interpolate(coarse, (32, 32), mode="bilinear") + tint


def run_cell(strategy: str, precision: str, recompute: str, accumulation: int, world: World) -> dict[str, list[float]]:
    """Losses (mean over the global batch) and gradient norms of STEPS steps."""
    name, values = choose_strategy(strategy, None, world.size)
    micro = BATCH // world.size // accumulation
    settings = StepSettings(precision, micro, accumulation, CLIP, (0.9, 0.95), 1e-8, recompute, compile=False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    built = build_strategy(
        name,
        values,
        world,
        lambda: NextEmbedding(CausalViT(ARCHITECTURE, dtype), ObjectiveConfig(mask_ratio=0.0)),
        lambda names: pretraining_groups(names, 0.05),
        settings,
    )
    for shard in built.shards:
        whole = initial_values(shard.name, shard.shape, ARCHITECTURE, seed=0).flatten()
        shard.tensors["master"].copy_(whole[shard.start : shard.stop])
    built.refresh()
    losses, norms = [], []
    for step in range(STEPS):
        mine = images(step).chunk(world.size)[world.rank].chunk(accumulation)
        keys = (torch.arange(BATCH) + step * BATCH).chunk(world.size)[world.rank].chunk(accumulation)
        total = torch.zeros((), device=world.device)
        for micro_step, (x, k) in enumerate(zip(mine, keys, strict=True)):
            inputs = {"images": x.to(world.device), "sample_keys": k.to(world.device)}
            total += built.forward_backward(inputs, micro_step)["loss"] / accumulation
        found = mean_over_ranks({"loss": total, "norm": built.step(LR)})
        losses.append(found["loss"])
        norms.append(found["norm"])
    built.close()
    return {"losses": losses, "norms": norms}


def worker(output: Path, strategies: list[str]) -> None:
    """Runs all cells of `strategies` on this rank; the main rank writes them."""
    world = join_world()
    cells = {}
    for cell in product(strategies, PRECISIONS, RECOMPUTE, ACCUMULATION):
        cells["/".join(map(str, cell))] = run_cell(*cell, world)
    if world.is_main:
        output.write_text(json.dumps(cells))
    leave_world()


def launch(strategies: tuple[str, ...], ranks: int) -> dict[str, dict[str, list[float]]]:
    """The cells of `strategies`, measured in one launch of `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cells.json"
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        subprocess.run(
            [*command, __file__, "--worker", str(output), "--strategies", *strategies],
            env=environment, check=True, capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        return json.loads(output.read_text())


def measure() -> list[dict[str, Any]]:
    """One row a cell: its names, largest relative loss difference, and the gradient norms' smallest and largest."""
    cells = launch(("single",), 1) | launch(SHARDED, RANKS)
    rows = []
    for key, cell in cells.items():
        strategy, precision, recompute, accumulation = key.split("/")
        reference = cells[f"single/{precision}/none/1"]["losses"]
        worst = max(abs(a - b) / abs(b) for a, b in zip(cell["losses"], reference, strict=True))
        rows.append(
            {
                "strategy": strategy,
                "precision": precision,
                "recompute": recompute,
                "accumulation": int(accumulation),
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
    parser.add_argument("--strategies", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.strategies)
        return
    text = table(measure())
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
