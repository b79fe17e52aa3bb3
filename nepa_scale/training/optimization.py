"""Which parameters decay, how fast they learn, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nepa_scale.config import Config, ConfigError
from nepa_scale.sharding.strategy import ParameterGroup


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, patch embedding, CLS and mask token; not to biases, norms, LayerScale.

    By name, since under ZeRO-3 every parameter is one-dimensional.
    """
    owner, _, kind = name.rpartition(".")
    return kind not in ("bias", "attention_scale", "mlp_scale") and not owner.endswith("norm")


def pretraining_groups(
    names: Sequence[str], weight_decay: float, rate_of: Callable[[str], float] | None = None
) -> list[ParameterGroup]:
    """Parameters that decay and that do not, those of each learning rate together.

    rate_of: factor on the learning rate of a parameter; None: 1. What weight decay takes off in a step does not depend
        on it: AdamW multiplies the two, so that the decay is divided by it.
    """
    members: dict[tuple[float, float], list[str]] = {}
    for name in sorted(names, key=decays, reverse=True):
        factor = rate_of(name) if rate_of else 1.0
        members.setdefault((weight_decay / factor if decays(name) else 0.0, factor), []).append(name)
    return [ParameterGroup(tuple(some), decay, factor) for (decay, factor), some in members.items()]


def peak_learning_rate(config: Config) -> float:
    """`optimizer.lr`, or by the linear scaling rule base_lr * global_batch_size / 256."""
    if config.optimizer.lr is not None:
        return config.optimizer.lr
    return config.optimizer.base_lr * config.train.global_batch_size / 256


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """The number of optimiser steps of the run.

    Raises:
        ConfigError: neither or both of train.steps and train.epochs given.
    """
    if (config.train.steps is None) == (config.train.epochs is None):
        raise ConfigError("give exactly one of train.steps and train.epochs (set the other to null)")
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, round(config.train.epochs * steps_per_epoch))


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """The number of steps of linear warmup."""
    if config.schedule.warmup_steps is not None:
        return config.schedule.warmup_steps
    return round(config.schedule.warmup_epochs * steps_per_epoch)


def learning_rate(step: int, *, peak: float, warmup: int, total: int, final_fraction: float) -> float:
    """The rate of update `step` (from 0): linear from 0 over `warmup` steps, then cosine to final_fraction * peak."""
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1.0 - final_fraction) * cosine)
