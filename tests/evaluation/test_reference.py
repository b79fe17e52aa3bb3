"""The frozen yardstick of predictions against scikit-learn's ridge regression, and at its two ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from nepa_scale.evaluation.reference import RIDGE, ReferencePrediction
from nepa_scale.sharding import join_world, leave_world

PATCH, GRID, WIDTH = 4, 3, 10


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    join_world()
    yield
    leave_world()


def patches_of(images: Tensor) -> Tensor:
    """[B, 9, 48] by plain loops over the grid, channels first."""
    rows = [
        images[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten(1)
        for r in range(GRID)
        for c in range(GRID)
    ]
    return torch.stack(rows, 1)


def measure(predictions: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]) -> float:
    reference = ReferencePrediction()
    nothing = torch.zeros(30, dtype=torch.bool)
    reference.fit_on(predictions[0][:30], images[0][:30], nothing)
    for part in (slice(0, 30), slice(30, None)):
        counted = torch.ones(len(images[0][part]), dtype=torch.bool)
        reference.fit_on(predictions[0][part], images[0][part], counted)
    reference.solve()
    reference.evaluate_on(predictions[0][:30], images[0][:30], nothing)
    counted = torch.ones(len(images[1]), dtype=torch.bool)
    counted[-3:] = False  # padding
    reference.evaluate_on(predictions[1], images[1], counted)
    return reference.cosine()


def pictures(count: int, seed: int) -> Tensor:
    return 0.5 + 0.3 * torch.randn(count, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(seed))


def test_as_scikit_learn() -> None:
    random = torch.Generator().manual_seed(3)
    images = pictures(80, 0), pictures(23, 1)
    mixing = torch.randn(3 * PATCH * PATCH, WIDTH, generator=random)
    predictions = []
    for some in images:  # the token before a patch knows something of it
        known = torch.zeros(len(some), 1 + GRID * GRID, WIDTH)
        known[:, :-1] = patches_of(some) @ mixing + 2.0 + torch.randn(len(some), GRID * GRID, WIDTH, generator=random)
        predictions.append(known)
    found = measure((predictions[0], predictions[1]), (images[0], images[1]))

    x, y = predictions[0][:, :-1].flatten(0, 1).numpy(), patches_of(images[0]).flatten(0, 1).numpy()
    strength = RIDGE * (x**2).mean() * len(x)
    ridge = Ridge(alpha=strength).fit(x.astype(np.float64), y.astype(np.float64))
    test_x, test_y = predictions[1][:-3, :-1].flatten(0, 1).numpy(), patches_of(images[1])[:-3].flatten(0, 1).numpy()
    told, true = ridge.predict(test_x) - y.mean(0), test_y - y.mean(0)
    expected = ((told * true).sum(1) / np.linalg.norm(told, axis=1) / np.linalg.norm(true, axis=1)).mean()
    assert 0.1 < expected < 0.9
    assert found == pytest.approx(expected, abs=2e-3)


def test_predictions_that_know_the_pixels_reach_one() -> None:
    images = pictures(80, 0), pictures(23, 1)
    predictions = [torch.nn.functional.pad(patches_of(some), (0, 0, 0, 1)) for some in images]
    assert measure((predictions[0], predictions[1]), images) > 0.99


def test_predictions_that_know_nothing_reach_nothing() -> None:
    images = pictures(80, 0), pictures(23, 1)
    predictions = [torch.randn(len(some), 10, WIDTH, generator=torch.Generator().manual_seed(9)) for some in images]
    assert abs(measure((predictions[0], predictions[1]), images)) < 0.05
