"""Quality of the features while a run trains, on every strategy, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor

from nepa_scale.data.batch import Batch, normalize
from nepa_scale.evaluation.features import Features, collect_features
from nepa_scale.evaluation.knn import knn_top1
from nepa_scale.evaluation.probe import fit_linear_probe
from nepa_scale.objectives import effective_rank
from nepa_scale.sharding import Strategy, World

PIXELS = 32  # side to which images are reduced for the raw-pixel baseline
SPECTRUM_ROWS = 4096  # features of which the effective rank is taken, evenly spread


def backbone_features(strategy: Strategy) -> Callable[[Batch], Tensor]:
    """Images -> the mean of their patches' outputs, float32 [B, D], by the strategy's module in eval mode."""

    def features(batch: Batch) -> Tensor:
        return strategy.module(normalize(batch.images, batch.flip))["predictions"][:, 1:].float().mean(1)

    return features


def pixel_features(batch: Batch) -> Tensor:
    """Images -> their pixels at 32 x 32, float32 [B, 3072]."""
    small = F.interpolate(normalize(batch.images, batch.flip), (PIXELS, PIXELS), mode="bilinear", antialias=True)
    return small.flatten(1)


def spectrum(features: Features) -> float:
    """RankMe (2210.02885) of features: their effective rank, which needs no labels."""
    rows = features.values[:: max(1, len(features.labels) // SPECTRUM_ROWS)]
    return effective_rank(rows.float()).item()


class FeatureEvaluation:
    """Weighted kNN (k 20, temperature 0.07), effective rank and, if asked for, a linear probe.

    bank, queries: make one ordered pass over this rank's share of training and validation samples
    """

    def __init__(
        self,
        bank: Callable[[], Iterable[Batch]],
        queries: Callable[[], Iterable[Batch]],
        classes: int,
        world: World,
        *,
        probe: bool = False,
    ) -> None:
        self.bank, self.queries, self.classes, self.world, self.probe = bank, queries, classes, world, probe

    def of_strategy(self, strategy: Strategy) -> dict[str, float]:
        """`knn_top1`, `features_effective_rank` and with a probe `probe_top1`, of its module as it is. Collective."""
        strategy.module.eval()
        try:
            bank, queries = self._collect(backbone_features(strategy))
        finally:
            strategy.module.train()
        found = {"knn_top1": self._knn(bank, queries), "features_effective_rank": spectrum(queries)}
        if self.probe:
            whole, device = bank.gathered(self.world), self.world.device
            probe = fit_linear_probe(whole.values.to(device), whole.labels.to(device), self.classes)
            found["probe_top1"] = probe.accuracy(queries.values.to(device), queries.labels.to(device))["top1"]
        return found

    def knn_of_pixels(self) -> float:
        """kNN accuracy of the images themselves, which features have to beat. Collective."""
        return self._knn(*self._collect(pixel_features))

    def _collect(self, features: Callable[[Batch], Tensor]) -> tuple[Features, Features]:
        bank = collect_features(self.bank(), features, self.world)
        return bank, collect_features(self.queries(), features, self.world).gathered(self.world)

    def _knn(self, bank: Features, queries: Features) -> float:
        """Neighbours are sought where the model is, each rank among its own part of the bank."""
        mine = bank.without_padding()
        return knn_top1(
            mine.values,
            mine.labels,
            queries.values,
            queries.labels,
            classes=self.classes,
            device=self.world.device,
            world=self.world,
        )
