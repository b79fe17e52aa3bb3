"""Throughput for people: text, and the picture of where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nepa_scale.profiling.figures import stacked_bars
from nepa_scale.profiling.throughput import PHASES, Throughput


def describe(label: str, result: Throughput) -> str:
    """One measurement."""
    rate, seconds = result.images_per_second, result.step_seconds
    total = sum(result.split.values())
    peak = (
        f"MFU {result.mfu:.1%}, HFU {result.hfu:.1%} of {result.peak_flops / 1e12:.3g} TFLOP/s a device "
        f"({result.peak_source})"
        if result.mfu is not None and result.hfu is not None and result.peak_flops is not None
        else "MFU unknown: the peak of this device is not (--measured-peak times a product)"
    )
    lines = [
        f"{label + ': ' if label else ''}{result.strategy} on {result.world_size} ranks, {result.micro_batch} images x "
        f"{result.accumulation} forward passes; {result.steps} steps",
        f"  {rate.median:,.1f} images/s ({rate.least:,.1f} - {rate.most:,.1f}), "
        f"{result.tokens_per_second:,.0f} tokens/s",
        f"  step {seconds.median:.4f} s ({seconds.least:.4f} - {seconds.most:.4f}); {peak}",
        "  phases: " + ", ".join(f"{name} {result.split[name] / total:.1%}" for name in PHASES),
        f"  peak memory {result.peak_memory_bytes / 1e9:.2f} GB on the fullest rank",
    ]
    return "\n".join(lines)


def draw(found: Sequence[tuple[str, Throughput]], size: str, path: Path) -> None:
    """The phases of the step, a bar for each measurement."""
    first = found[0][1]
    stacked_bars(
        path,
        f"Where a training step's time goes: {size}, {first.world_size} ranks",
        [label or result.strategy for label, result in found],
        {phase: [result.split[phase] for _, result in found] for phase in PHASES},
        "seconds, waiting for the device after every phase",
        marks={"whole step, not interrupted": [result.step_seconds.median for _, result in found]},
        value_format="{:.3f} s",
    )
