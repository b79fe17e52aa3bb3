"""The moving average over shards."""

from __future__ import annotations

import torch

from nepa_scale.sharding import Shard
from nepa_scale.training.ema import MovingAverage


class Recorder:
    """Counts how often the module was told to compute with changed masters."""

    def __init__(self) -> None:
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1


def shards() -> list[Shard]:
    return [
        Shard("a", (2, 3), 0, 4, {"master": torch.arange(4.0)}),
        Shard("b", (5,), 5, 5, {"master": torch.empty(0)}),  # a rank that holds nothing of a parameter
    ]


def test_average_follows_its_definition() -> None:
    held = shards()
    average = MovingAverage(held)
    expected = held[0].tensors["master"].clone()
    for step in range(5):
        held[0].tensors["master"].add_(step)
        average.update(torch.tensor(False), 0.9)
        expected = 0.9 * expected + 0.1 * held[0].tensors["master"]
    torch.testing.assert_close(held[0].tensors["ema"], expected)
    average.restart()
    assert torch.equal(held[0].tensors["ema"], held[0].tensors["master"])


def test_applying_swaps_and_puts_back() -> None:
    held = shards()
    average = MovingAverage(held)
    held[0].tensors["master"].add_(10)
    average.update(torch.tensor(False), 0.5)
    master, ema = held[0].tensors["master"].clone(), held[0].tensors["ema"].clone()
    strategy = Recorder()
    with average.applied(strategy):  # type: ignore[arg-type]
        assert torch.equal(held[0].tensors["master"], ema)
        assert strategy.refreshed == 1
    assert torch.equal(held[0].tensors["master"], master)
    assert torch.equal(held[0].tensors["ema"], ema)
    assert strategy.refreshed == 2


def test_a_refused_update_leaves_the_average_alone() -> None:
    held = shards()
    average = MovingAverage(held)
    held[0].tensors["master"].add_(1.7)
    before = held[0].tensors["ema"].clone()
    average.update(torch.tensor(True), 0.3)
    assert torch.equal(held[0].tensors["ema"], before)
