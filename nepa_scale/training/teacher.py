"""The run's moving average as the teacher of its own weights: one copy of them, under every sharding."""

from __future__ import annotations

from typing import Any

import torch

from nepa_scale.config import Config
from nepa_scale.objectives import needs_teacher
from nepa_scale.sharding import Strategy
from nepa_scale.training.ema import MovingAverage


class Teacher:
    """Gives what the averaged weights make of a micro-batch. Costs a forward pass, and to put them in and out again."""

    def __init__(self, strategy: Strategy, average: MovingAverage) -> None:
        self.strategy, self.average = strategy, average

    def teach(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` of the module with `taught`, [B, T, D], beside them. Collective.

        The teacher sees whole images at the student's coordinates, and without drop path.
        """
        with torch.no_grad(), self.average.applied(self.strategy):
            seen = self.strategy.module(images=inputs["images"], rope_scale=inputs["rope_scale"])
        return inputs | {"taught": seen["predictions"]}


def make_teacher(config: Config, strategy: Strategy, average: MovingAverage | None) -> Teacher | None:
    """Where the task has one; it then has a moving average, without which there is no such configuration."""
    if config.task != "pretrain" or not needs_teacher(config.objective):
        return None
    assert average is not None
    return Teacher(strategy, average)
