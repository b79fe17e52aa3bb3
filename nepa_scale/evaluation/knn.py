"""Weighted k-nearest-neighbour classification of features, in memory that does not grow with the bank."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.sharding import World
from nepa_scale.sharding.world import of_all_ranks

# the similarities held at a time, float32: 4096 x 16384 are 256 MiB
QUERIES_AT_ONCE = 4096
BANK_AT_ONCE = 16384


def knn_top1(
    bank_features: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | None = None,
    world: World | None = None,
) -> float:
    """Share of `features` whose neighbours in the bank vote for the right label, 0..1.

    Each of the k nearest by cosine similarity s votes for its label with weight exp(s / temperature), as in instance
    discrimination (1805.01978, section 3.4). A bank smaller than k votes as a whole.

    bank_features, features: float of any dtype [N, D] and [M, D], wherever they are; compared in float32
    bank_labels, labels: integers [N] and [M], 0..classes-1
    device: where to compare, None: where `features` are; the bank goes there in parts
    world: the bank is divided over its ranks: `bank_features` and `bank_labels` are this rank's part, `features` and
        `labels` are the same on all. Each rank searches its part, so that no rank ever holds the bank. Collective.

    Raises:
        ConfigError: no samples, or a label outside 0..classes-1; on all ranks alike.
    """
    _require_labels("the bank", bank_labels, classes, world)
    _require_labels("the evaluated set", labels, classes, None)
    device = features.device if device is None else device
    correct = 0
    for part, truth in zip(features.split(QUERIES_AT_ONCE), labels.split(QUERIES_AT_ONCE), strict=True):
        similarities, rows = nearest(F.normalize(part.to(device).float(), dim=1), bank_features, k)
        votes = bank_labels.cpu()[rows]
        if world is not None and world.size > 1:
            similarities, votes = _nearest_of_all(similarities, votes, k)
        predicted = weighted_vote(similarities, votes, classes, temperature)
        correct += int((predicted == truth.cpu()).sum())
    return correct / len(labels)


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, N) rows of `bank` [N, D] most similar to each of `queries` (float32 [M, D], normalised).

    Returns float32 cosine similarities, descending, and int64 row numbers, [M, min(k, N)] each, on the CPU.
    """
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK_AT_ONCE):
        part = F.normalize(bank[start : start + BANK_AT_ONCE].to(queries.device).float(), dim=1)
        similarities, found = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best = torch.cat([best, similarities], 1)
        rows = torch.cat([rows, found + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return best.cpu(), rows.cpu()


def weighted_vote(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """The label with the most weight among neighbours' `labels` [M, k] at `similarities` [M, k]; int64 [M].

    On the CPU, where the sums have one order and equal votes one winner.
    """
    # softmax: the weights up to a factor of each row, without overflow at a small temperature
    weights = (similarities.double() / temperature).softmax(1)
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels.long(), weights).argmax(1)


def _nearest_of_all(similarities: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest, [M, k], among those that each rank found in its part of the bank, [M, up to k]."""
    missing = k - similarities.shape[1]  # a vote of no weight for each
    found = F.pad(similarities, (0, missing), value=-torch.inf), F.pad(labels, (0, missing))
    (similarities, labels) = (torch.cat(of_all_ranks(part), dim=1) for part in found)
    similarities, kept = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], labels.gather(1, kept[:, :k])


def _require_labels(where: str, labels: Tensor, classes: int, world: World | None) -> None:
    found = [int(labels.min()), int(labels.max())] if labels.numel() else []
    if world is not None:
        parts: list[list[int]] = [[] for _ in range(world.size)]
        dist.all_gather_object(parts, found)
        found = [label for part in parts for label in part]
    if not found:
        raise ConfigError(f"kNN needs samples, and {where} has none")
    low, high = min(found), max(found)
    if low < 0 or high >= classes:
        raise ConfigError(
            f"kNN needs labels 0..{classes - 1}, and {where} has {low if low < 0 else high}: "
            "write the shards with labels, or switch the kNN evaluation off"
        )
