"""Plans for people: text, the picture of a plan, and the curves of scaling out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nepa_scale.config import ModelConfig
from nepa_scale.models import resolve_architecture, size_name
from nepa_scale.profiling.devices import Device
from nepa_scale.profiling.figures import PALETTE, save, stacked_bars
from nepa_scale.profiling.launch_scripts import as_word
from nepa_scale.profiling.plan import Assumptions, Choice, Job, step_time


def assumptions_text(s: Assumptions, device: Device) -> str:
    """What the numbers stand on, in one paragraph."""
    return (
        f"On paper, not measured: products at {s.product_efficiency:.0%} of {device.peak / 1e12:.0f} TFLOP/s, "
        f"element-wise work at {s.bandwidth_efficiency:.0%} of {device.bandwidth / 1e12:.2f} TB/s with {s.passes:g} "
        f"passes over the activations, rings at {s.link_efficiency:.0%} of {device.link / 1e9:.0f} GB/s in a host of "
        f"{device.per_host} and {device.network / 1e9:g} GB/s for each GPU between hosts, "
        f"all cards at once, {s.latency * 1e6:.0f} us of latency for each doubling of the ranks, "
        f"communication hidden behind up to {s.overlap:.0%} of the backward pass, "
        f"{s.reserve:.0%} of the memory and {s.framework / 1e9:g} GB kept free."
    )


def _size(job: Job) -> str:
    return size_name(resolve_architecture(job.model))


def describe(job: Job, choices: Sequence[Choice]) -> str:
    """The choices as a table."""
    lines = [
        f"{_size(job)} on {job.gpus} x {job.device.name} ({job.usable / 1e9:.1f} of "
        f"{job.device.memory / 1e9:.0f} GB usable), batch {job.global_batch}, {job.epochs:g} epochs of "
        f"{job.samples:,} images",
        f"  {'':2}{'strategy':9}{'micro':>6}{'accum.':>7}  {'recompute':10}{'GB':>7}{'step s':>9}{'images/s':>10}"
        f"{'MFU':>6}{'days':>8}{'GPU-hours':>11}",
    ]
    for index, c in enumerate(choices):
        if c.fits:
            lines.append(
                f"  {'->' if index == 0 else '':2}{c.strategy:9}{c.micro_batch:6}{c.accumulation:7}  {c.recompute:10}"
                f"{c.memory / 1e9:7.1f}{c.time.total:9.3f}{c.images_per_second:10,.0f}{c.mfu:6.0%}{c.days:8.2f}"
                f"{c.device_hours:11,.0f}"
            )
        else:
            lines.append(f"  {'':2}{c.strategy:9}does not fit: {c.change}")
    lines.append(f"  {assumptions_text(job.assumptions, job.device)}")
    return "\n".join(lines)


def describe_changes(file: str, changes: dict[str, tuple[Any, Any]]) -> str:
    """What the planned run has otherwise than the configuration file."""
    lines = [f"  {key}: {as_word(old)} -> {as_word(new)}" for key, (old, new) in changes.items()]
    return "\n".join([f"changed in {file}:" if lines else f"nothing is changed in {file}", *lines])


def facts_of(
    job: Job,
    choices: Sequence[Choice],
    file: str,
    changes: dict[str, tuple[Any, Any]] | None,
    command: str | None,
    script: str | None,
) -> dict[str, Any]:
    """The object of `tools/plan.py --json`; changes: key -> [in the file, planned]; null where nothing fits."""
    return {
        "size": _size(job),
        "gpus": job.gpus,
        "device": asdict(job.device),
        "global_batch": job.global_batch,
        "epochs": job.epochs,
        "samples": job.samples,
        "assumptions": asdict(job.assumptions),
        "fits": any(choice.fits for choice in choices),
        "recommended": choices[0].to_json() if choices[0].fits else None,
        "choices": [choice.to_json() for choice in choices],
        "config": file,
        "changes": changes,
        "command": command,
        "slurm": script,
    }


def draw(job: Job, choices: Sequence[Choice], path: Path) -> None:
    """The step of every strategy that fits, by what it spends time on."""
    fitting = [choice for choice in choices if choice.fits]
    stacked_bars(
        path,
        f"A step of {job.global_batch} images on paper: {_size(job)} on {job.gpus} x {job.device.name}",
        [f"{c.strategy}, {c.micro_batch} images, recompute {c.recompute}" for c in fitting],
        {
            "matrix products": [c.time.products for c in fitting],
            "element-wise work": [c.time.elementwise for c in fitting],
            "optimiser": [c.time.optimizer for c in fitting],
            "communication, not hidden": [c.time.communication for c in fitting],
        },
        "seconds",
        value_format="{:.3f} s",
    )


MICRO_BATCH = 64
SCALED = ("vit_b", "vit_l", "vit_g", "vit_1b", "vit_3b", "vit_7b")


def _worlds(device: Device) -> list[int]:
    return [device.per_host * 2**i for i in range(10)]


def scaling_curves(device: Device, strategy: str, assumptions: Assumptions) -> dict[str, dict[str, dict[int, float]]]:
    """Efficiency against one host, by size and number of GPUs: `weak` and `strong`.

    Weak: 64 images a GPU and step. Strong: one batch of 4096 images, on up to 4096 GPUs, at most 64 in a forward pass.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {"weak": {}, "strong": {}}
    for size in SCALED:
        model = ModelConfig(size=size)
        a = resolve_architecture(model)
        job = Job(model, device.per_host, device, assumptions=assumptions)
        micro = MICRO_BATCH

        def seconds(gpus: int, images: int, micro: int = micro, job: Job = job, a: Any = a) -> float:
            now = min(micro, images)
            return step_time(replace(job, gpus=gpus), a, strategy, now, images // now, "selective").total

        one = seconds(device.per_host, micro)
        curves["weak"][size] = {gpus: one / seconds(gpus, micro) for gpus in _worlds(device)}
        alone = seconds(device.per_host, 4096 // device.per_host) * device.per_host
        curves["strong"][size] = {
            gpus: alone / (gpus * seconds(gpus, 4096 // gpus)) for gpus in _worlds(device) if gpus <= 4096
        }
    return curves


def scaling_table(device: Device, strategies: Sequence[str], assumptions: Assumptions) -> str:
    """Markdown: efficiency at some numbers of GPUs, and up to how many a strategy pays (keeps half)."""
    lines = [
        "| strategy | size | weak, 64 GPUs | weak, 512 | weak, 4096 | strong, 64 | strong, 512 | "
        "GPUs for 4096 images with half the efficiency left |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for strategy in strategies:
        curves = scaling_curves(device, strategy, assumptions)
        for size in SCALED:
            weak, strong = curves["weak"][size], curves["strong"][size]
            cells = [weak[64], weak[512], weak[4096], strong[64], strong[512]]
            paying = max(gpus for gpus, value in strong.items() if value >= 0.5)
            lines.append(f"| {strategy} | {size} | " + " | ".join(f"{v:.0%}" for v in cells) + f" | {paying} |")
    return "\n".join(lines)


def draw_scaling(device: Device, strategies: Sequence[str], assumptions: Assumptions, path: Path) -> None:
    """Weak (above) and strong (below) efficiency against the number of GPUs, a column for each strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        2, len(strategies), figsize=(4.2 * len(strategies) + 1.2, 7.4), sharex=True, sharey=True, layout="constrained"
    )
    for column, strategy in enumerate(strategies):
        curves = scaling_curves(device, strategy, assumptions)
        for row, kind in enumerate(("weak", "strong")):
            axes = grid[row][column]
            for index, (size, points) in enumerate(curves[kind].items()):
                axes.plot(
                    list(points), [100 * v for v in points.values()], marker="o", markersize=3,
                    color=PALETTE[index], label=size,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks(_worlds(device), [str(n) for n in _worlds(device)], fontsize=8)
            axes.set_ylim(0, 105)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            what = f"{MICRO_BATCH} images a GPU" if kind == "weak" else "4096 images a step"
            axes.set_title(f"{strategy}, {kind} scaling: {what}", fontsize=10, loc="left")
            if row == 1:
                axes.set_xlabel(f"GPUs ({device.name}, {device.per_host} a host)")
            if column == 0:
                axes.set_ylabel("efficiency, % of one host's rate a GPU")
    grid[0][-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle("On paper: roofline and rings, recomputation selective, bf16", x=0.01, ha="left", fontsize=11)
    save(figure, path)
