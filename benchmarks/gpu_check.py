"""The pretraining step on one GPU: images/s, share of what this chip reaches in a matrix product, peak memory.

First the ceiling: a large bf16 product of random numbers. Then ViT-B/14, L/14, H/14 and g/14 at 224 px, uint8 images on
the device (noise, or with --shards crops augmented as in training), the optimiser and the moving average included: by
strategy (all on one GPU, so that what sharding itself costs shows), by recomputation, and against the same model in
plain PyTorch (official_style.py), all in this process. The most telling come first; what the time does not suffice for
is listed as not run. Results go to results/gpu_check.{json,md} here. Where there is no GPU, a small version runs on the
CPU, to see that the program works.

examples:
  python benchmarks/gpu_check.py                 on a GPU, under 8 minutes
  python benchmarks/gpu_check.py --minutes 3     less of it
  python benchmarks/gpu_check.py --shards data/imagenet/train
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from official_style import PlainStep, PlainViT
from report import RESULTS, machine, publish
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nepa_scale.config import ConfigError, DataConfig, ModelConfig, load_config
from nepa_scale.data import ShardSet, TrainStream
from nepa_scale.data.batch import Batch
from nepa_scale.models import resolve_architecture
from nepa_scale.profiling.flops import count_flops
from nepa_scale.profiling.memory import predict
from nepa_scale.profiling.setup import Setup
from nepa_scale.profiling.throughput import Spread, StepRunner, measured_product_rate, synchronize
from nepa_scale.sharding import World, join_world, leave_world

PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Cell:
    """What is measured. strategy: of ours, or `PLAIN`"""

    size: str
    strategy: str = "single"
    recompute: str = "none"


@dataclass(frozen=True)
class Plan:
    """cells: in order; image_size in pixels; batches: images of a step, the largest first; steps: timed"""

    cells: tuple[Cell, ...]
    image_size: int
    batches: tuple[int, ...]
    warmup: int
    steps: int


GPU = Plan(
    (
        *(Cell(size, strategy) for size in ("vit_b", "vit_l") for strategy in ("single", PLAIN)),
        Cell("vit_h"),
        *(Cell(size, strategy) for size in ("vit_l", "vit_b") for strategy in ("fsdp", "zero3", "zero1")),
        *(Cell("vit_l", "single", recompute) for recompute in ("selective", "full")),
        *(Cell("vit_b", "single", recompute) for recompute in ("selective", "full")),
        Cell("vit_g", "single", "selective"),
        *(Cell("vit_h", "single", recompute) for recompute in ("selective", "full")),
        *(Cell("vit_h", strategy) for strategy in ("fsdp", "zero3", "zero1")),
        Cell("vit_g", "zero3", "selective"),
    ),
    image_size=224,
    batches=(256, 192, 128, 96, 64, 48, 32, 16, 8),
    warmup=4,
    steps=10,
)
CPU = Plan(
    (
        *(Cell("vit_ti", strategy) for strategy in ("single", PLAIN, "fsdp", "zero1", "zero3")),
        *(Cell("vit_ti", "single", recompute) for recompute in ("selective", "full")),
    ),
    image_size=56,
    batches=(4,),
    warmup=1,
    steps=2,
)


def measure(cell: Cell, plan: Plan, world: World, compiled: bool | None, crops: Batch | None) -> dict[str, Any]:
    """A row: of the largest batch that fits, by prediction, and if that is wrong the next that does."""
    for batch in plan.batches:
        if not fits(cell, plan, batch, world.device):
            continue
        try:
            return asdict(cell) | {"batch": batch} | timed(cell, plan, batch, world, compiled, crops)
        except torch.OutOfMemoryError:
            pass
        finally:
            clear(world.device)
    return asdict(cell) | {"not_run": "too large for this device"}


def fits(cell: Cell, plan: Plan, batch: int, device: torch.device) -> bool:
    if device.type != "cuda" or cell.strategy == PLAIN:  # of which nothing is predicted: it is tried
        return True
    model = ModelConfig(size=cell.size, image_size=plan.image_size)
    predicted = predict(Setup(model, cell.strategy, 1, batch, "bf16", cell.recompute)).total
    return predicted < 0.9 * torch.cuda.get_device_properties(device).total_memory


def clear(device: torch.device) -> None:
    torch.compiler.reset()  # graphs of one size must not count against the limit of the next
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def timed(
    cell: Cell, plan: Plan, batch: int, world: World, compiled: bool | None, crops: Batch | None
) -> dict[str, Any]:
    config = load_config(
        None,
        [
            f"model.size={cell.size}", f"model.image_size={plan.image_size}", f"train.global_batch_size={batch}",
            "train.steps=1", "train.precision=bf16", f"activation_checkpointing={cell.recompute}",
            f"strategy={'single' if cell.strategy == PLAIN else cell.strategy}",
            f"compile={'null' if compiled is None else str(compiled).lower()}",
        ],
    )  # fmt: skip
    device = world.device
    side = plan.image_size
    some = StepRunner.noise(batch, (side, side), device) if crops is None else first(crops, batch)
    if cell.strategy == PLAIN:
        a = resolve_architecture(config.model)
        plain = PlainStep(
            PlainViT(a.width, a.depth, a.heads, a.mlp_width, a.patch_size, gated=a.gated, qk_norm=True).to(device),
            "bf16", config.ema.decay,
        )  # fmt: skip
        return rates(cell, plan, batch, device, lambda: plain(some.images))
    runner = StepRunner(config, world)
    runner.batches = itertools.repeat(some)
    try:
        return rates(cell, plan, batch, device, lambda: runner.step(_ignore))
    finally:
        runner.close()


def crops_of(shards: str, plan: Plan, device: torch.device) -> Batch:
    """The largest batch of the training stream, augmented as in training, on the device."""
    config, most = DataConfig(ragged="pad"), plan.batches[0]
    stream = TrainStream(
        ShardSet.open(shards, config), config, image_size=(plan.image_size, plan.image_size), global_batch_size=most,
        micro_batch_size=most, seed=0, rank=0, world_size=1,
    )  # fmt: skip
    try:
        return next(iter(stream)).to_device(device)
    finally:
        stream.close()


def first(batch: Batch, count: int) -> Batch:
    """The first images of a batch, with what belongs to them; lists, of which a step makes nothing, stay whole."""
    parts = {name: value[:count] for name, value in vars(batch).items() if not isinstance(value, list)}
    return replace(batch, **parts)


def rates(cell: Cell, plan: Plan, batch: int, device: torch.device, step: Callable[[], Any]) -> dict[str, Any]:
    began = time.perf_counter()
    for _ in range(plan.warmup):
        step()
    synchronize(device)
    warmup = time.perf_counter() - began
    seconds = []
    for _ in range(plan.steps):
        began = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    spread = Spread.of([batch / second for second in seconds])
    flops = count_flops(size=cell.size, image_size=plan.image_size).train_flops_per_image
    return {
        "images_per_second": spread.median,
        "images_per_second_spread": [spread.least, spread.most],
        "flops_per_second": spread.median * flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "waits_of_a_step": waits(step, device),
        "warmup_seconds": warmup,
    }


def waits(step: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for the device in a step; None on a host."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def table(facts: dict[str, Any]) -> str:
    rows, ceiling = facts["rows"], facts["ceiling_flops_per_second"]
    alone = {row["size"]: row for row in rows if row["strategy"] == "single" and row["recompute"] == "none"}
    lines = [
        f"Measured with `{facts['command']}` on {facts['device']} ({facts['machine']}): {facts['image_size']} px, "
        f"bf16, {'compiled' if facts['compiled'] else 'not compiled'}, images: {facts['images']}. "
        f"A large bf16 product of random numbers reaches "
        f"{ceiling / 1e12:.3g} TFLOP/s here: the ceiling. Medians of {facts['steps']} steps.",
        "",
        "| size | step | recomputation | images a step | images/s | of the ceiling | of single | GB | waits |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = f"| {row['size']} | {row['strategy']} | {row['recompute']} |"
        if "not_run" in row:
            lines.append(f"{name} not run: {row['not_run']} | | | | | |")
            continue
        base = alone.get(row["size"], {}).get("images_per_second")
        lines.append(
            f"{name} {row['batch']} | {row['images_per_second']:,.4g} | {row['flops_per_second'] / ceiling:.0%} | "
            f"{f'''{row['images_per_second'] / base:.2f}''' if base else ''} | "
            f"{f'''{row['peak_memory_bytes'] / 1e9:.1f}''' if row['peak_memory_bytes'] else ''} | "
            f"{'' if row['waits_of_a_step'] is None else row['waits_of_a_step']} |"
        )
    return "\n".join(lines) + "\n"


def _ignore(_phase: str) -> None:
    """No timing."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further row begins (default: 7.5)")
    parser.add_argument("--shards", metavar="SHARDS", help="of images to crop (default: noise)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON, and a table in .md beside it "
                        "(default: results/gpu_check.json here; on a CPU: ./gpu_check_cpu.json)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments, began = parse(), time.perf_counter()
    world = join_world()
    device = world.device
    plan, compiled = (GPU, False if arguments.no_compile else None) if device.type == "cuda" else (CPU, False)
    crops = crops_of(arguments.shards, plan, device) if arguments.shards else None
    facts: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "machine": machine(), "image_size": plan.image_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        "compiled": compiled is None, "images": arguments.shards or "noise", "steps": plan.steps, "rows": [],
        "ceiling_flops_per_second": measured_product_rate(device, "bf16"),
    }  # fmt: skip
    output = arguments.output or (RESULTS / "gpu_check.json" if device.type == "cuda" else Path("gpu_check_cpu.json"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(plan.cells))
        for cell in plan.cells:
            progress.update(bar, description=f"{cell.size} {cell.strategy} {cell.recompute}")
            if time.perf_counter() - began > 60 * arguments.minutes:
                facts["rows"].append(asdict(cell) | {"not_run": "out of time"})
            else:
                facts["rows"].append(measure(cell, plan, world, compiled, crops))
            progress.advance(bar)
            facts["minutes"] = (time.perf_counter() - began) / 60
            output.with_suffix(".part").write_text(table(facts))  # something is there if it is cut off
    output.with_suffix(".part").unlink()
    publish(output, facts, table(facts))
    leave_world()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
