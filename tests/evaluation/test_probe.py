"""The linear probe against scikit-learn's logistic regression on the same features."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nepa_scale.config import ConfigError
from nepa_scale.evaluation.probe import fit_linear_probe

CLASSES, WIDTH = 6, 24


def features_of(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters in an ill-scaled space."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    x = centres[labels] + 1.6 * torch.randn(count, WIDTH, generator=generator)
    return x * torch.logspace(-3, 3, WIDTH) + 100, labels


def test_as_good_as_logistic_regression() -> None:
    x, y = features_of(1500, 0)
    test_x, test_y = features_of(2000, 1)
    probe = fit_linear_probe(x, y, CLASSES)
    found = probe.accuracy(test_x, test_y)
    mean, scale = x.mean(0), x.std(0)
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(((x - mean) / scale).numpy(), y.numpy())
    expected = reference.score(((test_x - mean) / scale).numpy(), test_y.numpy())
    assert 0.6 < expected < 0.98  # neither hopeless nor trivial
    assert found["top1"] == pytest.approx(expected, abs=0.01)
    assert found["top1"] < found["top5"] <= 1.0
    assert probe.logits(test_x).shape == (2000, CLASSES)


def test_the_same_every_time() -> None:
    x, y = features_of(300, 2)
    one, other = (fit_linear_probe(x, y, CLASSES, epochs=5) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert one.lr == other.lr


def test_labels_must_fit() -> None:
    x, y = features_of(10, 3)
    with pytest.raises(ConfigError, match=r"labels 0\.\.2"):
        fit_linear_probe(x, y, 3)
