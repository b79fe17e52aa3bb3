"""Where images are cut: torchvision's distribution and geometry, as pure functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from nepa_scale.data.crops import Centre, centre, flipped, middle, random_resized_box

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
KEYS = range(4000)


def quantiles(values: list[float]) -> np.ndarray:
    return np.quantile(values, np.linspace(0.05, 0.95, 7))


def test_boxes_follow_torchvisions_distribution() -> None:
    ours = [random_resized_box(400, 300, key, SCALE, RATIO) for key in KEYS]
    torch.manual_seed(0)
    blank = torch.empty(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in KEYS]
    pairs = [
        ([b.width * b.height / 120_000 for b in ours], [h * w / 120_000 for _, _, h, w in theirs], 0.03),
        ([b.width / b.height for b in ours], [w / h for _, _, h, w in theirs], 0.03),
        ([b.left + b.width / 2 for b in ours], [left + w / 2 for _, left, _, w in theirs], 12.0),
        ([b.top + b.height / 2 for b in ours], [top + h / 2 for top, _, h, _ in theirs], 9.0),
    ]
    for found, expected, tolerance in pairs:
        assert np.abs(quantiles(found) - quantiles(expected)).max() < tolerance


@given(width=st.integers(1, 900), height=st.integers(1, 900), key=st.integers(-(2**63), 2**63 - 1))
def test_a_box_lies_in_the_image_and_depends_on_nothing_else(width: int, height: int, key: int) -> None:
    box = random_resized_box(width, height, key, SCALE, RATIO)
    assert box == random_resized_box(width, height, key, SCALE, RATIO)
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height
    assert box.width >= 1
    assert box.height >= 1


@pytest.mark.parametrize(("size", "expected"), [((1000, 10), (13, 10)), ((10, 1000), (10, 13))])
def test_where_no_try_fits_the_centre_is_taken(size: tuple[int, int], expected: tuple[int, int]) -> None:
    box = random_resized_box(*size, 0, (0.9, 1.0), RATIO)
    top, left, height, width = RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), [0.9, 1.0], list(RATIO))
    assert (box.width, box.height) == expected == (width, height)
    assert (box.left, box.top) == (left, top)


def test_every_other_sample_is_mirrored() -> None:
    assert abs(flipped(np.array(KEYS)).mean() - 0.5) < 0.03


SHARES = st.sampled_from([224 / 256, 0.875, 0.9, 0.95, 0.96, 1.0]) | st.floats(0.5, 1.0)


@settings(deadline=None)
@given(width=st.integers(20, 300), height=st.integers(20, 300), side=st.integers(1, 120), share=SHARES)
def test_the_centre_is_that_of_torchvision(width: int, height: int, side: int, share: float) -> None:
    place = centre(width, height, (side, side), share)
    resized = T.functional.resize(torch.empty(1, height, width), [int(side / share)], antialias=True)
    assert resized.shape[1:] == (place.height, place.width)
    rows = torch.arange(place.height)[:, None].expand(place.height, place.width)
    columns = torch.arange(place.width)[None].expand(place.height, place.width)
    cropped = T.functional.center_crop(torch.stack([rows, columns]), [side, side])
    assert cropped[:, 0, 0].tolist() == [place.top, place.left]


def test_of_a_strip_only_the_middle_is_resized() -> None:
    assert middle(400, 300) == (0, 0, 400, 300)
    assert middle(10, 1000) == (0, 460, 10, 80)
    assert middle(50_001, 1) == (24_996, 0, 8, 1)


def test_the_centre_of_a_target_that_is_not_square() -> None:
    assert centre(1000, 500, (128, 224)) == Centre(146, 292, 9, 34)
    assert centre(300, 900, (128, 224)) == Centre(768, 256, 320, 16)


@pytest.mark.parametrize(
    ("side", "share", "resized"),
    [(224, 0.875, 256), (224, 0.95, 235), (48, 0.875, 54), (96, 0.96, 100), (384, 1.0, 384), (56, 0.9, 62)],
)
def test_sizes_are_rounded_down(side: int, share: float, resized: int) -> None:
    assert centre(1000, 700, (side, side), share)[:2] == (resized, int(resized * 1000 / 700))
    assert centre(1000, 700, (side, side), share, squash=True)[:2] == (resized, resized)
