"""An exponential moving average of the weights that works under every sharding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nepa_scale.sharding import Shard, Strategy


class MovingAverage:
    """Averages each rank's own fp32 masters, next to them and under the name "ema" in their `Shard`s.

    A young average is for a large part what it began with. That share is the product of the decays of its updates; it
    is kept beside the average, on the device.
    """

    def __init__(self, shards: list[Shard]) -> None:
        for shard in shards:
            shard.tensors["ema"] = shard.tensors["master"].clone()
        held = [shard for shard in shards if shard.stop > shard.start]
        self._averages = [shard.tensors["ema"] for shard in held]
        self._masters = [shard.tensors["master"] for shard in held]
        self._share_before = 1.0
        self._decayed: Tensor | None = None  # since then; float64 []

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the present weights."""
        torch._foreach_copy_(self._averages, self._masters)
        self.set_initial_share(1.0)

    def initial_share(self) -> float:
        """The share, 0..1, that the weights with which the average began have in it. Waits for the device."""
        return self._share_before if self._decayed is None else self._share_before * self._decayed.item()

    def set_initial_share(self, share: float) -> None:
        """For an average that was read from a checkpoint."""
        self._share_before, self._decayed = share, None

    @torch.no_grad()
    def update(self, refused: Tensor, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * weights; nothing where the step's update was refused.

        refused: bool [], on the device: to leave out an update needs no wait for it
        """
        weight = torch.where(refused, 0.0, 1.0 - decay)
        kept = torch.full_like(refused, decay, dtype=torch.float64).masked_fill(refused, 1.0)
        self._decayed = kept if self._decayed is None else self._decayed * kept
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master, weight.to(average.device))

    @contextmanager
    def applied(self, strategy: Strategy) -> Iterator[None]:
        """Within the context the strategy's module computes with the averaged weights. Collective."""
        self._swap()
        strategy.refresh()
        try:
            yield
        finally:
            self._swap()
            strategy.refresh()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self._averages, self._masters, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
