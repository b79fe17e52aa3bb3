"""Quality of the features while a run trains, on every strategy, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.data.batch import Batch, normalize
from nepa_scale.evaluation.features import Features, collect_features
from nepa_scale.evaluation.knn import knn_top1
from nepa_scale.evaluation.probe import fit_linear_probe
from nepa_scale.evaluation.reference import ReferencePrediction
from nepa_scale.objectives import effective_rank
from nepa_scale.sharding import Strategy, World

PIXELS = 32  # side to which images are reduced for the raw-pixel baseline
SPECTRUM_ROWS = 4096  # features of which the effective rank is taken, evenly spread


Seen = Callable[[Tensor, Tensor, Tensor], None]  # told predictions, images, and which of them are not padding


def backbone_features(strategy: Strategy, seen: Seen | None = None) -> Callable[[Batch], Tensor]:
    """Images -> the mean of their patches' outputs, float32 [B, D], by the strategy's module in eval mode."""

    def features(batch: Batch) -> Tensor:
        images = normalize(batch.images, batch.flip)
        predictions = strategy.module(images)["predictions"]
        if seen is not None:
            seen(predictions, images, batch.samples >= 0)
        return predictions[:, 1:].float().mean(1)

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
    """Weighted kNN (k 20, temperature 0.07) and effective rank; with `probe` a linear probe and `ReferencePrediction`.

    bank, queries: make one ordered pass over this rank's share of training and validation samples
    classes: None: without labels, and so without kNN and linear probe
    """

    def __init__(
        self,
        bank: Callable[[], Iterable[Batch]],
        queries: Callable[[], Iterable[Batch]],
        classes: int | None,
        world: World,
        *,
        probe: bool = False,
    ) -> None:
        self.bank, self.queries, self.classes, self.world, self.probe = bank, queries, classes, world, probe

    def of_strategy(self, strategy: Strategy) -> dict[str, float]:
        """`features_effective_rank`, with a probe `reference_cosine`; by labels `knn_top1`, with a probe `probe_top1`.
        Collective."""
        strategy.module.eval()
        try:
            return self._measure(strategy)
        finally:
            strategy.module.train()

    @torch.no_grad()
    def _measure(self, strategy: Strategy) -> dict[str, float]:
        world, reference = self.world, ReferencePrediction() if self.probe else None
        bank = None
        if self.classes is not None or reference:
            seen = reference.fit_on if reference else None
            bank = collect_features(self.bank(), backbone_features(strategy, seen), world)
        if reference:
            reference.solve()
        seen = reference.evaluate_on if reference else None
        queries = collect_features(self.queries(), backbone_features(strategy, seen), world).gathered()
        found = {"features_effective_rank": spectrum(queries)}
        if bank is not None and self.classes is not None:
            found = {"knn_top1": self._knn(bank, queries, self.classes)} | found
            if self.probe:
                found["probe_top1"] = self._probe(bank.gathered(), queries, self.classes)
        return found | ({"reference_cosine": reference.cosine()} if reference else {})

    def knn_of_pixels(self) -> float:
        """kNN accuracy of the images themselves, which features have to beat; labelled sets only. Collective."""
        assert self.classes is not None
        bank = collect_features(self.bank(), pixel_features, self.world)
        return self._knn(bank, collect_features(self.queries(), pixel_features, self.world).gathered(), self.classes)

    def _knn(self, bank: Features, queries: Features, classes: int) -> float:
        """Neighbours are sought where the model is, each rank among its own part of the bank."""
        mine = bank.without_padding()
        return knn_top1(
            mine.values,
            mine.labels,
            queries.values,
            queries.labels,
            classes=classes,
            device=self.world.device,
            world=self.world,
        )

    def _probe(self, bank: Features, queries: Features, classes: int) -> float:
        device = self.world.device
        with torch.enable_grad():
            probe = fit_linear_probe(bank.values.to(device), bank.labels.to(device), classes)
        return probe.accuracy(queries.values.to(device), queries.labels.to(device))["top1"]
