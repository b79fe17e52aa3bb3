"""What a run evaluates beside its training, built for the loop: the features, or in fine-tuning the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import Config
from nepa_scale.data import EvaluationStream, ShardSet
from nepa_scale.data.batch import Batch
from nepa_scale.evaluation.accuracy import Accuracy
from nepa_scale.evaluation.online import FeatureEvaluation
from nepa_scale.sharding import Strategy, World
from nepa_scale.training.agreement import Agreement
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.finetuning import Finetuning
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.watchdog import Watchdog
from nepa_scale.training.weights import applied_by_default


@dataclass(frozen=True)
class Passes:
    """Makes ordered passes over a set, for evaluation; they end early where the run is asked to stop."""

    config: Config
    image_size: tuple[int, int]
    world: World
    agreement: Agreement
    watchdog: Watchdog

    def over(
        self, source: ShardSet, limit: int | None = None, classes: int | None = None
    ) -> Callable[[], Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            stream = EvaluationStream(
                source,
                self.config.data,
                image_size=self.image_size,
                batch_size=self.config.evaluate.batch_size,
                rank=self.world.rank,
                world_size=self.world.size,
                limit=limit,
                crop_share=self.config.evaluate.crop_share,
                squash=self.config.evaluate.squash,
                classes=classes,
            )
            try:
                yield from self.agreement.watched(stream, self.watchdog.alive)
            finally:
                stream.close()

        return batches


def make_evaluation(
    task: Pretraining | Finetuning,
    shards: ShardSet,
    val: ShardSet | None,
    passes: Passes,
    strategy: Strategy,
    average: MovingAverage | None,
) -> Callable[[], dict[str, Any]] | None:
    """The loop's evaluation: of the classifier, or of the features where both sets have labels."""
    if isinstance(task, Finetuning):
        if val is None:
            return None
        return classifier_evaluation(Accuracy(passes.over(val, classes=task.classes), passes.world), strategy, average)
    if val is None or shards.classes is None or val.classes is None:
        return None
    classes = max(shards.classes, val.classes)
    bank = passes.over(shards, passes.config.evaluate.bank)
    probe = passes.config.evaluate.probe
    features = FeatureEvaluation(bank, passes.over(val), classes, passes.world, probe=probe)
    return features_evaluation(features, strategy, average)


def features_evaluation(
    features: FeatureEvaluation, strategy: Strategy, average: MovingAverage | None
) -> Callable[[], dict[str, Any]]:
    """Of the default weights. Its first call of a run also measures what training has to beat."""

    def evaluate() -> dict[str, Any]:
        with applied_by_default(average, strategy) as weights:
            found = weights | features.of_strategy(strategy)
        if strategy.optimizer_steps() > 0:
            return found
        return found | {"knn_top1_untrained": found["knn_top1"], "knn_top1_pixels": features.knn_of_pixels()}

    return evaluate


def classifier_evaluation(
    accuracy: Accuracy, strategy: Strategy, average: MovingAverage | None
) -> Callable[[], dict[str, Any]]:
    """Of the default weights, and where they are the average beside them of the weights as trained."""

    def evaluate() -> dict[str, Any]:
        with applied_by_default(average, strategy) as weights:
            found = weights | accuracy.of_strategy(strategy)
        if found["weights"] == "raw":
            return found
        return found | {f"{name}_raw": value for name, value in accuracy.of_strategy(strategy).items()}

    return evaluate
