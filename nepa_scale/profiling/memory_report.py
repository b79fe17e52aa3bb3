"""Memory for people: text, picture, and the table of predicted against measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nepa_scale.models import resolve_architecture, size_name
from nepa_scale.profiling.figures import stacked_bars
from nepa_scale.profiling.memory import COMPONENTS, Memory
from nepa_scale.profiling.setup import Setup

GIB = 2**30


def _size(setup: Setup) -> str:
    return size_name(resolve_architecture(setup.model))


def facts_of(predicted: Memory, measured: dict[str, int] | None) -> dict[str, Any]:
    """One object of `tools/memory.py --json`."""
    setup = predicted.setup
    facts = dataclasses.asdict(setup)
    return {
        "size": _size(setup),
        "strategy": setup.strategy,
        "world_size": setup.world_size,
        "micro_batch": setup.micro_batch,
        "precision": setup.precision,
        "activation_checkpointing": setup.recompute,
        "ema": setup.ema,
        "offload": setup.offload,
        "model": facts["model"],
        "predicted": predicted.to_json(),
        "measured": measured,
        "error": None if measured is None else predicted.total / measured["total"] - 1.0,
    }


def describe(facts: dict[str, Any]) -> str:
    """One setup as a table; bytes as GiB, small ones as MiB."""
    measured = facts["measured"]
    predicted = facts["predicted"]
    unit, name = (GIB, "GiB") if predicted["total"] > GIB else (2**20, "MiB")
    lines = [
        f"{facts['size']}, {facts['strategy']} on {facts['world_size']} ranks, {facts['micro_batch']} images a rank, "
        f"{facts['precision']}, recomputation {facts['activation_checkpointing']}"
        + (", moving average" if facts["ema"] else "")
        + (", offloaded" if facts["offload"] else ""),
        f"  {name:22}{'predicted':>12}" + (f"{'measured':>12}" if measured else ""),
    ]
    for kind in dict.fromkeys([*COMPONENTS, *(measured or {}), "total"]):
        row = predicted.get(kind, 0), (measured or {}).get(kind, 0)
        if any(row):
            lines.append(f"  {kind:22}{row[0] / unit:12.3f}" + (f"{row[1] / unit:12.3f}" if measured else ""))
    lines.append(f"  fullest at: {predicted['moment']}")
    if predicted["host"]:
        lines.append(f"  and {predicted['host'] / GIB:.3f} GiB in the host's memory, for each rank")
    if measured:
        lines.append(f"  predicted / measured - 1 = {facts['error']:+.2%} (kinds differ in what they call other)")
    return "\n".join(lines)


def draw(predicted: Sequence[Memory], measured: Sequence[dict[str, int]] | None, path: Path) -> None:
    """Components stacked, a bar for each setup, with what was measured as a mark."""
    first = predicted[0].setup
    unit, name = (GIB, "GiB") if max(p.total for p in predicted) > GIB else (2**20, "MiB")
    stacked_bars(
        path,
        f"Memory of the fullest rank: {_size(first)}, {first.micro_batch} images a rank, {first.precision}, "
        f"recomputation {first.recompute}",
        [f"{p.setup.strategy} x{p.setup.world_size}" for p in predicted],
        {kind: [p.components[kind] / unit for p in predicted] for kind in COMPONENTS},
        f"{name} at the fullest moment of the step",
        marks=None if measured is None else {"measured": [m["total"] / unit for m in measured]},
        value_format="{:.1f}",
    )
