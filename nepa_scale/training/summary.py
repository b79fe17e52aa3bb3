"""What a run prints before its first step and after its last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nepa_scale.models import size_name
from nepa_scale.sharding import ParameterGroup
from nepa_scale.training.loop import Run
from nepa_scale.training.run_folder import read_json_lines
from nepa_scale.training.run_record import describe_changes, record_in
from nepa_scale.training.schedule import Schedule


def print_plan(run: Run, start: int, samples: int) -> None:
    """A few lines that say what is about to happen; the resolved configuration is in RUN/config.yaml."""
    plan, schedule, config = run.plan, run.schedule, run.config
    print(
        f"{config.task}: {size_name(run.task.architecture)}, {run.task.parameters:,} parameters, "
        f"{config.train.precision}, {run.strategy.name} on {run.world.size} x {run.world.device.type}\n"
        f"data: {samples:,} images, {schedule.steps_per_epoch} steps an epoch; "
        f"batch {plan.global_batch_size} = {run.world.size} ranks x {plan.micro_batch_size} x {plan.accumulation}\n"
        f"schedule: {schedule.total} steps, {schedule.warmup} warmup, peak lr {schedule.peak_lr:.3g}; "
        f"{run.costs.train_flops_per_image * plan.global_batch_size * schedule.total:.3g} FLOPs\n"
        f"run folder: {run.folder}" + (f", resumed after step {start}" if start else ""),
        flush=True,
    )
    if config.task == "finetune":
        print(rates_table(run.schedule, run.strategy.groups), flush=True)


def rates_table(schedule: Schedule, groups: Sequence[ParameterGroup]) -> str:
    """What each group of parameters learns with; a rate of 0: it is frozen."""
    width = max(12, *(len(group.label) + 2 for group in groups))
    lines = [f"{'parameters':<{width}}{'tensors':>8}{'peak lr':>12}{'warmup':>8}{'decay':>8}"]
    for group in groups:
        end = "" if group.weight_decay_end is None else f" -> {group.weight_decay_end:g}"
        lines.append(
            f"{group.label:<{width}}{len(group.names):>8}{schedule.peak_lr * group.lr_scale:>12.3g}"
            f"{schedule.warmup_of(group):>8}{group.weight_decay:>8g}{end}"
        )
    return "\n".join(lines)


def _when(row: dict[str, Any]) -> str:
    """Of which step and which weights an evaluation is; rows once named no weights."""
    return f"step {row['step']}" + (f", {row['weights']} weights" if "weights" in row else "")


def print_summary(folder: Path) -> None:
    """The result of a finished run: last loss, kNN accuracy against its baselines, and where the curves are."""
    from nepa_scale.training.curves import plot_curves  # imports matplotlib, which takes a second

    rows = read_json_lines(folder / "metrics.jsonl")
    losses = [row for row in rows if row.get("loss") is not None]
    scores = [row for row in rows if "knn_top1" in row]
    accuracies = [row for row in rows if "top1" in row]
    print(f"\nfinished {folder}")
    record = record_in(folder)
    if record is not None and record.changes():
        print(f"  {describe_changes(record.changes())}")
    if losses:
        print(f"  loss                          {losses[-1]['loss']:.4f}  (step {losses[-1]['step']})")
    if scores:
        first, last = scores[0], scores[-1]
        print(f"  kNN top-1, trained            {last['knn_top1']:.1%}  ({_when(last)})")
        for key, label in (("knn_top1_untrained", "untrained network"), ("knn_top1_pixels", "raw pixels")):
            if key in first:
                margin = 100 * (last["knn_top1"] - first[key])
                print(f"  kNN top-1, {label:<18} {first[key]:.1%}  (trained {margin:+.1f} points)")
    if accuracies:
        last = accuracies[-1]
        print(f"  top-1, top-5                  {last['top1']:.1%}, {last['top5']:.1%}  ({_when(last)})")
    print(f"  curves                        {plot_curves(folder)}", flush=True)
