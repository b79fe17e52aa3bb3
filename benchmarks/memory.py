"""Predicted against measured memory: six strategies, two sizes, two recomputation modes, two precisions.

Every cell runs the real step (one process for single, two ranks for the rest) and counts the bytes of its live tensors
at their peak. Results go to results/memory.{json,md,png} here.

examples:
  python benchmarks/memory.py                    48 cells, about four minutes on two cores
  python benchmarks/memory.py --precision bf16
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from report import RESULTS, publish
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nepa_scale.config import ModelConfig
from nepa_scale.profiling.figures import stacked_bars
from nepa_scale.profiling.memory import COMPONENTS, predict
from nepa_scale.profiling.memory_measured import measure
from nepa_scale.profiling.memory_report import facts_of
from nepa_scale.profiling.setup import Setup

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
SIZES = ("vit_ti", "vit_s")
RECOMPUTE = ("none", "full")


def setups(precision: str, size: str, depth: int) -> list[Setup]:
    """The cells of one precision and size."""
    model = ModelConfig(size=size, image_size=112, depth=depth)
    return [
        Setup(model, strategy, 1 if strategy == "single" else 2, 4, precision, recompute)
        for strategy, recompute in product(STRATEGIES, RECOMPUTE)
    ]


def buckets(setup: Setup, measured: dict[str, int]) -> int:
    """Bytes of DeepSpeed's fixed reduction buckets, against which small models' own memory vanishes."""
    element = 2 if setup.precision == "bf16" else 4
    if setup.strategy == "zero3":
        return 4 * 10**8
    if setup.strategy in ("zero1", "zero2") and measured["total"] > 2 * element * 10**8:
        return 2 * element * 10**8
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "Measured with `python benchmarks/memory.py`: the bytes of live tensors at the peak of the real step on the "
        "fullest rank, on the CPU (`single`: one process, the others two ranks); 112 px in patches of 14, 4 images a "
        f"rank, {rows[0]['model']['depth']} blocks. The last column leaves out DeepSpeed's fixed reduction buckets "
        f"(400 or 800 MB, `ds_configs/`), beside which models this small vanish. Worst: "
        f"{max(abs(row['error']) for row in rows):.2%}, without buckets "
        f"{max(abs(row['error_without_buckets']) for row in rows):.2%}.",
        "",
        "| size | precision | strategy | recomputation | predicted MB | measured MB | error | without buckets |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['size']} | {r['precision']} | {r['strategy']} | {r['activation_checkpointing']} | "
        f"{r['predicted']['total'] / 1e6:.2f} | {r['measured']['total'] / 1e6:.2f} | {r['error']:+.2%} | "
        f"{r['error_without_buckets']:+.2%} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument("--depth", type=int, default=6, help="blocks of each model (default: 6)")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json", help="where the numbers go")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        groups = list(product(arguments.precision, SIZES))
        task = bar.add_task("groups of 12 cells", total=len(groups))
        for precision, size in groups:
            cells = setups(precision, size, arguments.depth)
            for cell, found in zip(cells, measure(cells), strict=True):
                row = facts_of(predict(cell), found)
                fixed = buckets(cell, found)
                row["error_without_buckets"] = (row["predicted"]["total"] - fixed) / (found["total"] - fixed) - 1.0
                rows.append(row)
            bar.advance(task)
    publish(arguments.json, rows, table(rows))
    shown = [r for r in rows if r["size"] == SIZES[-1] and r["precision"] == arguments.precision[-1]]
    stacked_bars(
        arguments.json.with_suffix(".png"),
        f"Predicted and measured: {SIZES[-1]}, {arguments.precision[-1]}, DeepSpeed's fixed buckets left out",
        [f"{r['strategy']} x{r['world_size']}, recompute {r['activation_checkpointing']}" for r in shown],
        {
            kind: [
                (r["predicted"][kind] - (fixed_of(r) if kind == "communication" else 0)) / 1e6 for r in shown
            ]
            for kind in COMPONENTS
        },
        "MB on the fullest rank at the step's fullest moment",
        marks={"measured": [(r["measured"]["total"] - fixed_of(r)) / 1e6 for r in shown]},
    )  # fmt: skip


def fixed_of(row: dict[str, Any]) -> int:
    return buckets(Setup(strategy=row["strategy"], precision=row["precision"]), row["measured"])


if __name__ == "__main__":
    main()
