"""Linear semantic segmentation: batch norm and a 1x1 convolution on dense features that stay as they are.

Shapes: B images, C classes, K channels of the features, P pixels of a patch. Labels are uint8, 255 where a pixel does
not count. Everything is the same on any number of ranks, up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nepa_scale.config import ConfigError
from nepa_scale.data.batch import normalize
from nepa_scale.data.segmentation_folder import IGNORED, RandomCrops, Split, Survey, WholeImages
from nepa_scale.models import CausalViT
from nepa_scale.sharding import World

Shown = Callable[[Iterable[Any], str, int], Iterator[Any]]  # passes an iterable of a known length on, with progress


@dataclass(frozen=True)
class DenseFeatures:
    """The maps of some blocks (from 0) side by side. Any object with `patch`, `channels` and this call does as well."""

    backbone: CausalViT
    blocks: Sequence[int]
    causal: bool = True

    @property
    def patch(self) -> int:
        return self.backbone.architecture.patch_size

    @property
    def channels(self) -> int:
        return len(self.blocks) * self.backbone.architecture.width

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, h, w] -> float32 [B, K, h / P, w / P]."""
        upright = images.new_zeros(len(images), dtype=torch.bool)
        return torch.cat(
            self.backbone.dense_features(normalize(images, upright), self.blocks, causal=self.causal), dim=1
        )


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all ranks' features, without weights: the convolution's follow.

    No gradient goes through the statistics, as features are given; every rank must bring equally many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean = _mean_over_ranks(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = _mean_over_ranks(centred.square().mean((0, 2, 3)))
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(variance, 0.1)
        return centred * (variance + self.eps).rsqrt()[:, None, None]


class LinearHead(nn.Module):
    """Features [B, K, h, w] -> logits [B, C, h, w]. Starts at zero: there is nothing to draw."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.norm = SharedBatchNorm(channels)
        self.classify = nn.Conv2d(channels, classes, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.norm(features))


@dataclass(frozen=True)
class Recipe:
    """AdamW with cosine decay to 0; `batch_size` crops are a step of all ranks together."""

    steps: int = 4000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4


def survey(splits: Sequence[Split], patch: int, classes: int | None, world: World, workers: int, shown: Shown) -> int:
    """Reads every file of the splits once, each on one rank, and returns the number of classes. Collective.

    classes: what the user says it is; None: one more than the highest label
    Raises:
        ConfigError: on every rank alike, for the first file that cannot be used or is labelled above `classes`.
    """
    tops = []
    for split in splits:
        mine = range(world.rank, len(split), world.size)
        pairs = _load(Survey(split, patch), workers, sampler=mine, batch_size=None)
        found = _gather(list(zip(mine, shown(pairs, "checking the files", len(mine)), strict=True)), world)
        for index, (top, problem) in sorted(found):
            if problem:
                raise ConfigError(problem)
            if classes is not None and top >= classes:
                first = int(split.zero_is_ignored)
                raise ConfigError(
                    f"{split.pairs[index][1]} has label {top + first}, and {classes} classes are "
                    f"{first}..{classes - 1 + first}: give more --classes, or mend it"
                )
        tops.append(max(top for _, (top, _) in found))
        if tops[-1] < 0:
            raise ConfigError(f"no pixel counts in the annotations of {split.pairs[0][1].parent}: all are ignored")
    return classes or max(tops) + 1


def train_head(
    features: DenseFeatures, classes: int, crops: RandomCrops, recipe: Recipe, world: World, workers: int, shown: Shown
) -> tuple[LinearHead, float]:
    """A head trained on crops, in eval mode, and its mean loss over the last tenth of the steps. Collective.

    Raises:
        ConfigError: ranks do not divide the batch.
    """
    share, rest = divmod(recipe.batch_size, world.size)
    if rest or not share:
        raise ConfigError(
            f"{world.size} ranks do not divide a batch of {recipe.batch_size}: choose another --batch-size"
        )
    head = LinearHead(features.channels, classes).to(world.device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    mine = [
        range(step * recipe.batch_size + world.rank * share, step * recipe.batch_size + (world.rank + 1) * share)
        for step in range(recipe.steps)
    ]
    losses = []
    for images, labels in shown(_load(crops, workers, batch_sampler=mine), "training", recipe.steps):
        targets = labels.to(world.device).long()
        counted = _sum_over_ranks((targets != IGNORED).sum()).clamp_min(1)
        logits = _upsample(head(features(images.to(world.device))), targets.shape[-2:])
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / counted
        optimizer.zero_grad()
        loss.backward()
        for parameter in head.parameters():
            assert parameter.grad is not None
            _sum_over_ranks(parameter.grad)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, recipe.steps // 10) :]).mean()
    return head.eval(), _sum_over_ranks(last).item()


@torch.no_grad()
def confusion_matrix(
    features: DenseFeatures, head: LinearHead, images: WholeImages, world: World, workers: int, shown: Shown
) -> Tensor:
    """Pixels of each class (row) taken for each class (column), every image counted once: int64 [C, C] on the host.

    Collective.
    """
    counts = torch.zeros(head.classes, head.classes, dtype=torch.int64, device=world.device)
    mine = range(world.rank, len(images), world.size)
    for image, label in shown(_load(images, workers, sampler=mine, batch_size=None), "evaluating", len(mine)):
        truth = label.to(world.device)
        counts += count_pixels(truth, predict(features, head, image.to(world.device), truth.shape), head.classes)
    return _sum_over_ranks(counts).cpu()


def count_pixels(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """The confusion matrix int64 [C, C] of labels and predictions, uint8 [H, W] each; row: label."""
    counted = truth != IGNORED
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


@torch.no_grad()
def predict(features: DenseFeatures, head: LinearHead, image: Tensor, size: Sequence[int]) -> Tensor:
    """The class of every pixel of an image uint8 [3, h, w], at `size`: uint8 [H, W].

    Square windows of the shorter side, as many as cover the image and evenly spread, are what the backbone sees; where
    they overlap, logits are averaged.
    """
    patch = features.patch
    grid = [pixels // patch for pixels in image.shape[1:]]
    side = min(grid)
    total = torch.zeros(1, head.classes, *grid, device=image.device)
    times = torch.zeros_like(total[:, :1])
    for y, x in itertools.product(*(window_starts(length, side) for length in grid)):
        window = image[:, y * patch : (y + side) * patch, x * patch : (x + side) * patch]
        total[..., y : y + side, x : x + side] += head(features(window.unsqueeze(0)))
        times[..., y : y + side, x : x + side] += 1
    return _upsample(total / times, size)[0].argmax(0).to(torch.uint8)


def window_starts(length: int, window: int) -> list[int]:
    """Where the fewest windows begin that cover `length`, evenly spread."""
    windows = -(-length // window)
    return [index * (length - window) // max(windows - 1, 1) for index in range(windows)]


def scores(confusion: Tensor, first: int) -> dict[str, Any]:
    """`miou`, `mean_accuracy`, `pixel_accuracy` and `per_class`, 0..1, of a confusion matrix [C, C], row: label.

    Means are over the classes that have a value: IoU where a class is labelled or predicted anywhere, accuracy where
    it is labelled; others are null in `per_class`.

    first: the number that annotations give to the first class
    """
    matrix = confusion.double()
    right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = right / (labelled + predicted - right), right / labelled  # 0 / 0 is nan
    return {
        "miou": iou.nanmean().item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "pixel_accuracy": (right.sum() / matrix.sum()).item(),
        "per_class": [
            {"label": label, "iou": None if math.isnan(one) else one, "accuracy": None if math.isnan(two) else two}
            for label, (one, two) in enumerate(zip(iou.tolist(), accuracy.tolist(), strict=True), first)
        ],
    }


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _load(data: Dataset[Any], workers: int, **what: Any) -> DataLoader[Any]:
    context = "forkserver" if workers else None
    return DataLoader(data, num_workers=workers, multiprocessing_context=context, **what)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    return _sum_over_ranks(tensor) / (dist.get_world_size() if dist.is_initialized() else 1)


def _gather(mine: list[Any], world: World) -> list[Any]:
    parts: list[Any] = [mine]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]
