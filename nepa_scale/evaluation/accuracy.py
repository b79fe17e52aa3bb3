"""Top-1 and top-5 accuracy of a classifier, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_scale.data.batch import Batch, normalize
from nepa_scale.sharding import Strategy, World


class Accuracy:
    """Of the labelled validation images, each counted once.

    batches: makes one ordered pass over this rank's share of them; equally many batches on every rank
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], world: World) -> None:
        self.batches, self.world = batches, world

    def of_strategy(self, strategy: Strategy) -> dict[str, float]:
        """As `of_module`, of the strategy's module as it is now."""
        strategy.module.eval()
        try:
            return self.of_module(strategy.module)
        finally:
            strategy.module.train()

    @torch.no_grad()
    def of_module(self, classifier: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, float]:
        """`top1` and `top5`, 0..1, by the "logits" that it gives for normalised images. Collective."""
        counts = torch.zeros(3, dtype=torch.int64, device=self.world.device)  # right, among the first five, all
        for host in self.batches():
            batch = host.to_device(self.world.device)
            logits = classifier(normalize(batch.images, batch.flip))["logits"]
            counts += count_right(logits, batch.labels, batch.samples >= 0)
        dist.all_reduce(counts)
        right, among_five, total = counts.tolist()
        return {"top1": right / max(total, 1), "top5": among_five / max(total, 1)}


def count_right(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """How many labels are the first of the logits [B, C], among their first five, and how many there are: int64 [3].

    counted: bool [B], which rows are images and not padding
    """
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    hits = torch.stack([first[:, 0], first.any(1), torch.ones_like(counted)])
    return (hits & counted).sum(1)
