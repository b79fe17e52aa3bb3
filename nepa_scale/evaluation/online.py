"""kNN accuracy of the features while a run trains, on every strategy, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.data.batch import Batch, normalize
from nepa_scale.evaluation.knn import knn_top1
from nepa_scale.sharding import Strategy, World

PIXELS = 32  # side to which images are reduced for the raw-pixel baseline


def backbone_features(strategy: Strategy) -> Callable[[Batch], Tensor]:
    """Images -> the mean of their patches' outputs, float32 [B, D], by the strategy's module in eval mode."""

    def features(batch: Batch) -> Tensor:
        return strategy.module(normalize(batch.images, batch.flip))["predictions"][:, 1:].float().mean(1)

    return features


def pixel_features(batch: Batch) -> Tensor:
    """Images -> their pixels at 32 x 32, float32 [B, 3072]."""
    small = F.interpolate(normalize(batch.images, batch.flip), (PIXELS, PIXELS), mode="bilinear", antialias=True)
    return small.flatten(1)


@torch.no_grad()
def collect_features(
    batches: Iterable[Batch], features: Callable[[Batch], Tensor], world: World
) -> tuple[Tensor, Tensor]:
    """Features float32 [N, D] and labels [N] of all ranks' samples, in the order of the set, on every host. Collective.

    Every rank must bring equally many batches of one size (a sharded module gathers its weights in each), as
    `EvaluationStream` does; what it marks as padding is left out.
    """
    found, labels, samples = [], [], []
    for batch in batches:
        found.append(features(batch.to_device(world.device)).float().cpu())
        labels.append(batch.labels)
        samples.append(batch.samples)
    order, position = _gather(torch.cat(samples), world).sort(stable=True)
    position = position[order >= 0]
    return _gather(torch.cat(found), world)[position], _gather(torch.cat(labels), world)[position]


def _gather(part: Tensor, world: World) -> Tensor:
    """The ranks' parts [n, ...] after one another, [ranks * n, ...]."""
    parts = [torch.empty_like(part) for _ in range(world.size)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


class KnnEvaluation:
    """Weighted kNN (k 20, temperature 0.07) of validation images among training images.

    bank, queries: make one ordered pass over this rank's share of training and validation samples
    """

    def __init__(
        self,
        bank: Callable[[], Iterable[Batch]],
        queries: Callable[[], Iterable[Batch]],
        classes: int,
        world: World,
    ) -> None:
        self.bank, self.queries, self.classes, self.world = bank, queries, classes, world

    def top1(self, features: Callable[[Batch], Tensor]) -> float:
        """Share of the validation images that their neighbours classify right, 0..1. Collective."""
        bank, bank_labels = collect_features(self.bank(), features, self.world)
        queries, labels = collect_features(self.queries(), features, self.world)
        return knn_top1(bank, bank_labels, queries, labels, classes=self.classes)

    def of_strategy(self, strategy: Strategy) -> float:
        """`top1` of the strategy's module as it is now."""
        strategy.module.eval()
        try:
            return self.top1(backbone_features(strategy))
        finally:
            strategy.module.train()
