"""A run's plan without the run: what `train.py --dry-run` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nepa_scale.config import Config, to_dict
from nepa_scale.sharding import ParameterGroup
from nepa_scale.training.batching import BatchPlan
from nepa_scale.training.metrics import Costs
from nepa_scale.training.schedule import Schedule
from nepa_scale.training.summary import rates_table


def facts_of(
    config: Config,
    *,
    strategy: str,
    world_size: int,
    plan: BatchPlan,
    schedule: Schedule,
    groups: Sequence[ParameterGroup],
    costs: Costs,
    parameters: int,
    samples: int,
) -> dict[str, Any]:
    """The object of `--dry-run --json`.

    Rates follow from `groups` and `schedule`: linear from 0 to `peak_lr` over `warmup_steps`, then the cosine over the
    other steps of `total_steps`. A group with the rate 0 is frozen.
    samples: of data.train
    """
    return {
        "config": to_dict(config),
        "strategy": strategy,
        "parameters": parameters,
        "batches": asdict(plan)
        | {"world_size": world_size, "samples": samples, "steps_per_epoch": schedule.steps_per_epoch},
        "schedule": {
            "total_steps": schedule.total,
            "warmup_steps": schedule.warmup,
            "peak_lr": schedule.peak_lr,
            "final_lr_fraction": schedule.final_lr_fraction,
        },
        "groups": [
            {
                "label": group.label,
                "parameters": list(group.names),
                "weight_decay": group.weight_decay,
                "weight_decay_end": group.weight_decay_end,
                "peak_lr": schedule.peak_lr * group.lr_scale,
                "warmup_steps": schedule.warmup_of(group),
            }
            for group in groups
        ],
        "costs": asdict(costs) | {"total_flops": costs.train_flops_per_image * plan.global_batch_size * schedule.total},
    }


def describe(facts: dict[str, Any], schedule: Schedule, groups: Sequence[ParameterGroup]) -> str:
    """The same for people."""
    config, batches, costs = facts["config"], facts["batches"], facts["costs"]
    return "\n".join(
        [
            f"{config['task']}: {facts['parameters']:,} parameters, {config['train']['precision']}, "
            f"{facts['strategy']} on {batches['world_size']} ranks",
            f"data: {batches['samples']:,} images, {batches['steps_per_epoch']} steps an epoch; batch "
            f"{batches['global_batch_size']} = {batches['world_size']} ranks x {batches['micro_batch_size']} x "
            f"{batches['accumulation']}",
            f"schedule: {schedule.total} steps, {schedule.warmup} warmup, peak lr {schedule.peak_lr:.3g}; "
            f"{costs['total_flops']:.3g} FLOPs",
            rates_table(schedule, groups),
            "dry run: nothing was trained, and nothing was written to the run folder",
        ]
    )
