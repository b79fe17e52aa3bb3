"""The quality of features, measured once after training: kNN, linear probes at several depths, and their spectrum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nepa_scale.data.batch import Batch, normalize
from nepa_scale.evaluation.features import Features, collect_features
from nepa_scale.evaluation.knn import knn_top1
from nepa_scale.evaluation.online import spectrum
from nepa_scale.evaluation.probe import fit_linear_probe
from nepa_scale.models import CausalViT
from nepa_scale.sharding import World

NEIGHBOURS = {"knn_top1": 20, "knn10_top1": 10}


@dataclass(frozen=True)
class FeatureSettings:
    """Which features: of these blocks (from 0), with causal attention or not, mean of the patches or last token."""

    blocks: Sequence[int]
    causal: bool = True
    pooling: str = "mean"  # mean | last


def spread_blocks(depth: int) -> list[int]:
    """The blocks at a quarter, half, three quarters and the end of the depth, from 0."""
    return sorted({max(1, round(depth * share / 4)) - 1 for share in (1, 2, 3, 4)})


def pooled_features(backbone: CausalViT, settings: FeatureSettings) -> Callable[[Batch], Tensor]:
    """Images -> the features of all blocks side by side, float32 [B, blocks * D]."""

    def features(batch: Batch) -> Tensor:
        images = normalize(batch.images, batch.flip)
        states = backbone.hidden_states(images, settings.blocks, causal=settings.causal)
        if settings.pooling == "last":
            return torch.cat([state[:, -1] for state in states], dim=1)
        return torch.cat([state[:, 1:].mean(1) for state in states], dim=1)

    return features


def evaluate_features(
    backbone: CausalViT,
    train: Iterable[Batch] | None,
    val: Iterable[Batch],
    classes: int | None,
    world: World,
    settings: FeatureSettings,
    *,
    probe: bool = True,
) -> dict[str, Any]:
    """kNN accuracy and effective rank of the last of the blocks, and linear probes of each. Collective.

    train, val: one ordered pass over this rank's share, as `EvaluationStream` makes it; labelled
    classes: None: without labels, and then the effective rank alone, which needs no `train`
    Returns `knn_top1` (k 20), `knn10_top1`, `effective_rank` (RankMe, 2210.02885, of validation features) and, with
    `probe`, `probe_top1` (best block, chosen on training features held out), `probe_last_top1` and `probe` by block.
    """
    features = pooled_features(backbone, settings)
    bank = None if train is None or classes is None else collect_features(train, features, world)
    queries = collect_features(val, features, world).gathered()
    width = backbone.architecture.width
    last = replace(queries, values=queries.values[:, -width:])
    found: dict[str, Any] = {"effective_rank": spectrum(last)}
    if bank is None or classes is None:
        return found
    mine = bank.without_padding()
    for key, k in NEIGHBOURS.items():
        found[key] = knn_top1(
            mine.values[:, -width:],
            mine.labels,
            last.values,
            last.labels,
            classes=classes,
            k=k,
            device=world.device,
            world=world,
        )
    if probe:
        found |= _probes(bank.gathered(), queries, width, classes, world.device, settings.blocks)
    return found


def _probes(
    bank: Features, queries: Features, width: int, classes: int, device: torch.device, blocks: Sequence[int]
) -> dict[str, Any]:
    table = []
    by_block = zip(blocks, bank.values.split(width, dim=1), queries.values.split(width, dim=1), strict=True)
    for block, train, val in by_block:
        fitted = fit_linear_probe(train.to(device), bank.labels.to(device), classes)
        scores = fitted.accuracy(val.to(device), queries.labels.to(device))
        table.append({"block": block + 1, "lr": fitted.lr, "held_out": fitted.held_out, **scores})
    best = max(table, key=lambda row: row["held_out"])
    return {
        "probe_top1": best["top1"],
        "probe_block": best["block"],
        "probe_last_top1": table[-1]["top1"],
        "probe": table,
    }
