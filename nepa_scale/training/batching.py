"""How a global batch is spread over ranks and forward passes, and what a step of it is told."""

from __future__ import annotations

from dataclasses import dataclass

from nepa_scale.config import Config, ConfigError, TrainConfig
from nepa_scale.sharding import StepSettings


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size * accumulation * world_size."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int


def plan_batches(train: TrainConfig, world_size: int) -> BatchPlan:
    """The micro-batch and the accumulation that follow from the global batch and the number of ranks.

    Raises:
        ConfigError: the numbers do not divide; the message says which would work.
    """
    total = train.global_batch_size
    if total % world_size:
        below = total // world_size * world_size
        choices = [str(n) for n in (below, below + world_size) if n > 0]
        raise ConfigError(
            f"train.global_batch_size={total} does not divide over {world_size} ranks; nearest that do: "
            f"{', '.join(choices)}"
        )
    per_rank = total // world_size
    micro = train.micro_batch_size or per_rank
    if per_rank % micro:
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide a rank's {per_rank} images a step "
            f"(train.global_batch_size={total} over {world_size} ranks); that do: {', '.join(map(str, divisors[-12:]))}"
        )
    return BatchPlan(total, micro, per_rank // micro)


def step_settings(config: Config, plan: BatchPlan, *, compiled: bool = False) -> StepSettings:
    """The part of the configuration that a strategy is told; compiled: see `choose_compilation`."""
    return StepSettings(
        precision=config.train.precision,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
        clip=config.optimizer.clip,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        recompute=config.activation_checkpointing,
        compile=compiled,
        memory_budget=config.activation_memory_budget,
    )
