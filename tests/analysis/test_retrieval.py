"""Retrieval of the next patch against embeddings and ranks made by hand."""

from __future__ import annotations

import statistics

import pytest
import torch

from nepa_scale.analysis.retrieval import NextPatchRetrieval, RankCounts, cosines, ranks


def test_ranks_by_hand() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.2, 0.2, 0.2], [0.7, 0.7 + 1e-8, 0.1, 0.9]])
    assert ranks(similarities, torch.tensor([2, 3, 0])).tolist() == [2.0, 2.5, 2.5]
    unseen = torch.tensor([[False, True, True, True], [False, True, True, True], [True, True, True, False]])
    assert ranks(similarities, torch.tensor([2, 3, 0]), unseen).tolist() == [1.0, 2.0, 1.5]


def test_cosines_ignore_lengths() -> None:
    found = cosines(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.0, 9.0], [5.0, 5.0]]))
    assert found.tolist()[0] == pytest.approx([1.0, 0.0, 0.5**0.5])


def test_counts_are_those_of_the_list() -> None:
    seen = [1.0, 1.0, 2.5, 4.0, 7.5, 30.0, 1.0]
    counts = RankCounts()
    for part in (seen[:3], seen[3:]):
        counts.add(torch.tensor(part))
    assert counts.scores() == {
        "top1": pytest.approx(3 / 7),
        "top5": pytest.approx(5 / 7),
        "median_rank": statistics.median_low(seen),
        "mean_reciprocal_rank": pytest.approx(statistics.mean(1 / rank for rank in seen)),
    }


def test_chance_is_the_mean_over_all_orders() -> None:
    counts, sizes = RankCounts(), [7, 3, 3, 1]
    counts.add_chance(torch.tensor(sizes[:2]))
    counts.add_chance(torch.tensor(sizes[2:]))
    harmonic = {n: sum(1 / r for r in range(1, n + 1)) / n for n in sizes}
    assert counts.scores() == {
        "top1": pytest.approx(statistics.mean(1 / n for n in sizes)),
        "top5": pytest.approx(statistics.mean(min(5 / n, 1) for n in sizes)),
        "median_rank": 2.0,  # within it: 2/7 + 2/3 + 2/3 + 1 of 4 orders
        "mean_reciprocal_rank": pytest.approx(statistics.mean(harmonic[n] for n in sizes)),
    }


def axes(*order: int) -> torch.Tensor:
    return torch.eye(8)[list(order)]


def test_a_perfect_prediction_a_copy_and_a_constant() -> None:
    """Six different patches after CLS: the next one is never among those seen, and a copy is nearest to itself."""
    embeddings = axes(7, 0, 1, 2, 3, 4, 5)
    perfect = NextPatchRetrieval()
    perfect.add(embeddings, 3 * axes(0, 1, 2, 3, 4, 5, 6))  # the last prediction has no target
    facts = perfect.facts()
    assert facts["predictions"] == 5
    assert facts["cosine"] == {"model": pytest.approx(1.0), "copy": 0.0, "mean": 0.0}
    assert facts["all"]["model"] == {"top1": 1.0, "top5": 1.0, "median_rank": 1.0, "mean_reciprocal_rank": 1.0}
    assert facts["all"]["copy"]["top1"] == 0
    assert facts["all"]["copy"]["median_rank"] == 4.0  # itself first, the five others share ranks 2 to 6
    assert facts["all"]["chance"]["top1"] == pytest.approx(1 / 6)

    constant = NextPatchRetrieval()
    constant.add(embeddings, axes(6).expand(7, -1))
    facts = constant.facts()
    assert facts["all"]["model"]["median_rank"] == 3.5
    # unseen are 5, 4, 3, 2, 1 patches, all equally near: the middle of each; only the last is sure
    assert facts["unseen"]["model"]["mean_reciprocal_rank"] == pytest.approx((1 / 3 + 2 / 5 + 1 / 2 + 2 / 3 + 1) / 5)
    assert facts["unseen"]["model"]["top1"] == pytest.approx(1 / 5)


def test_copy_and_mean_win_where_images_are_smooth() -> None:
    """Patches that turn by equal angles: the unseen patch nearest to the one before, and to all before, is the next."""
    angles = torch.arange(10) * 0.1
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = NextPatchRetrieval()
    found.add(embeddings, torch.zeros(10, 2))
    facts = found.facts()
    assert facts["unseen"]["copy"]["top1"] == 1.0
    assert facts["unseen"]["mean"]["top1"] == 1.0
    assert facts["all"]["copy"] == {
        "top1": 0.0,
        "top5": 1.0,
        "median_rank": 2.5,  # as near as the one before
        "mean_reciprocal_rank": pytest.approx((7 / 2.5 + 1 / 2) / 8),
    }
