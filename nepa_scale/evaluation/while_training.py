"""What a run evaluates beside its training, built for the loop: the features, or in fine-tuning the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import Config, ConfigError
from nepa_scale.data import EvaluationStream, ShardSet
from nepa_scale.data.batch import Batch
from nepa_scale.evaluation.accuracy import Accuracy
from nepa_scale.evaluation.held_out import match_classes, require_other_images
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


@dataclass(frozen=True)
class Validation:
    """What a run evaluates on.

    shards: of data.val, labelled as data.train where both name their classes
    same: how many of its images are in data.train as well; on the main rank only
    notes: lines for people
    """

    shards: ShardSet
    same: int
    notes: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """`val_in_train`, the share of images that were trained on, where it is not 0."""
        return {"val_in_train": self.same / len(self.shards)} if self.same else {}


def make_validation(shards: ShardSet, val: ShardSet, config: Config, same: int) -> Validation:
    """Holds data.val against data.train.

    same: see `Validation`
    Raises:
        ConfigError: most images are the same; a class that data.train does not have; or, in fine-tuning, no labels.
    """
    notes = [require_other_images(same, len(val), "data.val", "data.train")]
    if val.classes is None or shards.classes is None:
        if config.task == "finetune":
            raise ConfigError(f"task=finetune needs labels, and the shards of data.val={config.data.val} have none")
        nameless = " and ".join(
            name for name, one in (("data.train", shards), ("data.val", val)) if one.classes is None
        )
        measured = "features_effective_rank" + (", reference_cosine" if config.evaluate.probe else "")
        notes.append(f"no labels in {nameless}: what is evaluated without them is {measured}")
        return Validation(val, same, tuple(filter(None, notes)))
    val, note = match_classes(val, "data.val", shards.class_names, shards.classes, "data.train")
    if config.task == "finetune" and (val.classes or 0) > shards.classes:
        raise ConfigError(f"data.val has {val.classes} classes, and data.train only {shards.classes}")
    return Validation(val, same, tuple(filter(None, [*notes, note])))


def make_evaluation(
    task: Pretraining | Finetuning,
    shards: ShardSet,
    validation: Validation | None,
    passes: Passes,
    strategy: Strategy,
    average: MovingAverage | None,
) -> Callable[[], dict[str, Any]] | None:
    """The loop's evaluation: of the classifier, or of the features, by labels where both sets have them."""
    if validation is None:
        return None
    val = validation.shards
    if isinstance(task, Finetuning):
        accuracy = Accuracy(passes.over(val, classes=task.classes), passes.world)
        evaluate = classifier_evaluation(accuracy, strategy, average)
    else:
        labelled = shards.classes is not None and val.classes is not None
        classes = max(shards.classes or 0, val.classes or 0) if labelled else None
        bank = passes.over(shards, passes.config.evaluate.bank)
        probe = passes.config.evaluate.probe
        features = FeatureEvaluation(bank, passes.over(val), classes, passes.world, probe=probe)
        evaluate = features_evaluation(features, strategy, average)
    return lambda: evaluate() | validation.facts


def features_evaluation(
    features: FeatureEvaluation, strategy: Strategy, average: MovingAverage | None
) -> Callable[[], dict[str, Any]]:
    """Of the default weights. Its first call of a run also measures what training has to beat."""

    def evaluate() -> dict[str, Any]:
        with applied_by_default(average, strategy) as weights:
            found = weights | features.of_strategy(strategy)
        if strategy.optimizer_steps() > 0 or features.classes is None:
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
