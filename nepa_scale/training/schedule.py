"""What changes from step to step: learning rates, weight decay and the decay of the moving average.

All of it is a function of the step alone, computed on the host: nothing is carried along, so that a resumed run goes on
as the uninterrupted one would, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nepa_scale.config import Config, ConfigError
from nepa_scale.sharding.strategy import ParameterGroup


@dataclass(frozen=True)
class Schedule:
    """The run's length and what its steps compute with; steps are updates, counted from 0."""

    total: int
    warmup: int
    peak_lr: float
    final_lr_fraction: float
    steps_per_epoch: int
    ema_decay: float = 0.0
    ema_decay_end: float | None = None  # null: constant

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> Schedule:
        """That of a run whose epochs have so many steps. Raises ConfigError as `total_steps` does."""
        return cls(
            total=total_steps(config, steps_per_epoch),
            warmup=warmup_steps(config, steps_per_epoch),
            peak_lr=peak_learning_rate(config),
            final_lr_fraction=config.schedule.final_lr_fraction,
            steps_per_epoch=steps_per_epoch,
            ema_decay=config.ema.decay,
            ema_decay_end=config.ema.decay_end,
        )

    def warmup_of(self, group: ParameterGroup) -> int:
        """Steps of the group's warmup. A share of the run's is rounded, but never to a start at the full rate."""
        if group.warmup_scale == 1.0:
            return self.warmup
        return max(1, round(self.warmup * group.warmup_scale))

    def rates(self, step: int, groups: Sequence[ParameterGroup]) -> list[float]:
        """Learning rates of the groups."""
        return [self._rate(step, self.peak_lr * group.lr_scale, self.warmup_of(group)) for group in groups]

    def weight_decays(self, step: int, groups: Sequence[ParameterGroup]) -> list[float]:
        """Weight decays of the groups."""
        return [
            group.weight_decay
            if group.weight_decay_end is None
            else weight_decay(step, start=group.weight_decay, end=group.weight_decay_end, total=self.total)
            for group in groups
        ]

    def average_decay(self, step: int) -> float:
        """Decay of the moving average, which follows the update."""
        if self.ema_decay_end is None:
            return self.ema_decay
        return average_decay(step, start=self.ema_decay, end=self.ema_decay_end, total=self.total)

    def _rate(self, step: int, peak: float, warmup: int) -> float:
        return learning_rate(step, peak=peak, warmup=warmup, total=self.total, final_fraction=self.final_lr_fraction)


def learning_rate(step: int, *, peak: float, warmup: int, total: int, final_fraction: float) -> float:
    """The rate of update `step` (from 0): linear from 0 over `warmup` steps, then cosine to final_fraction * peak."""
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1.0 - final_fraction) * cosine)


def weight_decay(step: int, *, start: float, end: float, total: float) -> float:
    """The weight decay of update `step` (from 0): by a cosine to `end`, which the last update has.

    As in I-JEPA's official code, which counts from 1: the first update is one step on the way already.
    """
    progress = min((step + 1) / total, 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def average_decay(step: int, *, start: float, end: float, total: float) -> float:
    """The decay of the average after update `step` (from 0), linear from `start`; it would reach `end` after the last.

    As in I-JEPA's official code, which counts from 0 here.
    """
    return start + (end - start) * min(step / total, 1.0)


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
