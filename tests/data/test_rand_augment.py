"""timm's RandAugment without its state."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_words
from nepa_scale.data.rand_augment import RandAugment
from tests.data.images import picture

POLICY = "rand-m9-mstd0.5-inc1"


def image() -> torch.Tensor:
    return torch.from_numpy(np.array(picture(40, 32)))


def augmented(augment: RandAugment, key: int) -> torch.Tensor:
    pixels = image()
    augment(pixels, key)
    return pixels


def test_it_is_timms() -> None:
    theirs = rand_augment_transform(
        POLICY, {"translate_const": 14, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
    )
    augment = RandAugment(POLICY, (32, 40), "bicubic")
    changed = 0
    for key in range(40):
        random.seed(hash_words("augment", key))
        np.random.seed(hash_words("augment", key) % 2**32)
        expected = torch.from_numpy(np.array(theirs(Image.fromarray(image().numpy()))))
        assert torch.equal(augmented(augment, key), expected)
        changed += not torch.equal(expected, image())
    assert changed > 20  # of 40: each of two operations is left out half the time


def test_a_function_of_the_key_alone_that_leaves_other_randomness_alone() -> None:
    augment = RandAugment(POLICY, (32, 40), "bilinear")
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    first = [augmented(augment, key) for key in range(10)]
    random.seed(3)
    np.random.seed(3)
    again = [augmented(pickle.loads(pickle.dumps(augment)), key) for key in reversed(range(10))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (random.random(), np.random.random()) == expected


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment.rand_augment=strong is not a policy of timm's RandAugment"):
        RandAugment("strong", (32, 32), "bilinear")
