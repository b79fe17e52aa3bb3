"""The streamed kNN against a brute force and against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.evaluation import knn

CLASSES, WIDTH = 7, 16


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters, so that near neighbours disagree and their weights decide."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, WIDTH, generator=generator), labels


BANK, BANK_LABELS = clusters(500, 1)
QUERIES, LABELS = clusters(203, 2)


def brute_force(k: int, temperature: float) -> float:
    """One query at a time, by the definition."""
    correct = 0
    for query, truth in zip(QUERIES.double(), LABELS.tolist(), strict=True):
        found = []
        for row, label in zip(BANK.double(), BANK_LABELS.tolist(), strict=True):
            found.append((float(query @ row / (query.norm() * row.norm())), label))
        votes = dict.fromkeys(range(CLASSES), 0.0)
        for similarity, label in sorted(found, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        correct += max(votes, key=votes.__getitem__) == truth
    return correct / len(LABELS)


def streamed(k: int, temperature: float = 0.07) -> float:
    return knn.knn_top1(BANK, BANK_LABELS, QUERIES, LABELS, classes=CLASSES, k=k, temperature=temperature)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that divide nothing, one of them smaller than k."""
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 37)
    monkeypatch.setattr(knn, "BANK_AT_ONCE", 17)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 0.07), (20, 10.0)])
def test_as_brute_force(k: int, temperature: float) -> None:
    assert streamed(k, temperature) == brute_force(k, temperature)


def test_the_weights_matter() -> None:
    """The comparison above would not see a missing weight if they did not."""
    assert streamed(20, 0.02) != streamed(20, 1e3)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("k", [1, 10, 20])
def test_as_scikit_learn(k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    import numpy

    classifier = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: numpy.exp((1 - distances) / 0.07)
    )
    classifier.fit(BANK.double().numpy(), BANK_LABELS.numpy())
    assert streamed(k) == classifier.score(QUERIES.double().numpy(), LABELS.numpy())


@pytest.mark.usefixtures("small_parts")
def test_nearest_are_the_nearest() -> None:
    queries = torch.nn.functional.normalize(QUERIES, dim=1)
    similarities, rows = knn.nearest(queries, BANK, 30)
    expected, expected_rows = (queries @ torch.nn.functional.normalize(BANK, dim=1).T).topk(30, dim=1)
    torch.testing.assert_close(similarities, expected, rtol=0, atol=1e-6)
    assert (rows == expected_rows).float().mean() > 0.999  # rounding may swap two equals


def test_length_does_not_matter() -> None:
    scaled = knn.knn_top1(BANK * 300.0, BANK_LABELS, QUERIES * 0.01, LABELS, classes=CLASSES)
    assert scaled == streamed(20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    converted = knn.knn_top1(BANK.to(dtype), BANK_LABELS, QUERIES.to(dtype), LABELS, classes=CLASSES)
    assert converted == pytest.approx(streamed(20), abs=0.02)


def test_a_bank_smaller_than_k_votes_as_a_whole() -> None:
    assert whole_bank(k=20) == whole_bank(k=5)


def whole_bank(k: int) -> float:
    return knn.knn_top1(BANK[:5], BANK_LABELS[:5], QUERIES, LABELS, classes=CLASSES, k=k)


def test_an_image_finds_itself() -> None:
    assert knn.knn_top1(BANK, BANK_LABELS, BANK, BANK_LABELS, classes=CLASSES, k=1) == 1.0


@pytest.mark.parametrize(("labels", "message"), [([-1, 0], "has -1"), ([0, 9], "has 9"), ([], "has none")])
def test_impossible_labels(labels: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        knn.knn_top1(BANK[: len(labels)], torch.tensor(labels), QUERIES, LABELS, classes=CLASSES)
