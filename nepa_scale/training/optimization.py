"""Which parameters decay, how fast they learn, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nepa_scale.config import Config, ConfigError
from nepa_scale.sharding.strategy import ParameterGroup


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, patch embedding, CLS and mask token; not to biases, norms, LayerScale.

    By name, since under ZeRO-3 every parameter is one-dimensional.
    """
    owner, _, kind = name.rpartition(".")
    return kind not in ("bias", "attention_scale", "mlp_scale") and not owner.endswith("norm")


def pretraining_groups(names: Sequence[str], weight_decay: float) -> list[ParameterGroup]:
    """Two groups, decayed and not; an empty one is left out."""
    decayed = tuple(name for name in names if decays(name))
    others = tuple(name for name in names if not decays(name))
    groups = [ParameterGroup(decayed, weight_decay), ParameterGroup(others, 0.0)]
    return [group for group in groups if group.names]


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
