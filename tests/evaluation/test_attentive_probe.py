"""The attentive probe finds what the mean of the tokens does not show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.data.batch import Batch
from nepa_scale.evaluation import attentive_probe
from nepa_scale.evaluation.accuracy import Accuracy
from nepa_scale.evaluation.attentive_probe import LEARNING_RATES, AttentiveHead, AttentiveProbe
from nepa_scale.sharding import World, join_world, leave_world

CLASSES, WIDTH, TOKENS = 3, 64, 17


class OneTokenKnows:
    """A backbone whose images' class shows in one token, which wears a mark, at any place, among louder ones."""

    class architecture:
        width = WIDTH

    def hidden_states(self, images: Tensor, blocks: list[int], *, causal: bool) -> list[Tensor]:
        assert blocks == [1]
        assert causal
        random = torch.Generator().manual_seed(int(images[0].sum() * 1000) % 2**31)
        labels = images[:, 0, 0, 0].mul(127.5).add(127.5).round().long()  # the image's red is its class
        tokens = torch.randn(len(images), TOKENS, WIDTH, generator=random)
        tokens[:, :, :3] = F.one_hot(torch.randint(3, (len(images), TOKENS), generator=random), 3) * 6.0
        tokens[:, :, 3] = 0
        place = torch.randint(TOKENS, (len(images),), generator=random)
        rows = torch.arange(len(images))
        tokens[rows, place, :3] = F.one_hot(labels, 3) * 6.0
        tokens[rows, place, 3] = 12.0
        return [tokens]


def batches(count: int, seed: int) -> Iterator[Batch]:
    random = np.random.default_rng(seed)
    for number in range(count):
        labels = torch.from_numpy(random.integers(0, CLASSES, 64))
        images = torch.from_numpy(random.integers(0, 256, (64, 3, 4, 4), dtype=np.uint8))
        images[:, 0, 0, 0] = labels.to(torch.uint8)
        keys = torch.arange(64) + 64 * number
        yield Batch(images, torch.zeros(64, dtype=torch.bool), labels, keys, keys, keys.numpy(), [str(k) for k in keys])


@pytest.fixture
def world() -> Iterator[World]:
    yield join_world()
    leave_world()


def test_finds_the_token_that_knows(world: World) -> None:
    backbone: Any = OneTokenKnows()
    probe = AttentiveProbe(backbone, 1, CLASSES, world)
    accuracy = Accuracy(lambda: batches(10, 1), world)
    before = accuracy.of_module(probe)["top1"]
    probe.fit(batches(150, 0), 150, 50)
    after = accuracy.of_module(probe)
    assert before < 0.5
    assert after["top1"] > 0.9
    assert after["top5"] == 1.0  # of three classes
    assert probe.lr in LEARNING_RATES


def test_held_out_images_are_not_trained_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them held out: nothing is learnt."""
    monkeypatch.setattr(attentive_probe, "HELD_OUT", 1.0)
    monkeypatch.setattr(attentive_probe, "WEIGHT_DECAY", 0.0)
    backbone: Any = OneTokenKnows()
    probe = AttentiveProbe(backbone, 1, CLASSES, world)
    before = [parameter.clone() for head in probe.heads for parameter in head.parameters()]
    probe.fit(batches(5, 0), 5, 5)
    after = [parameter for head in probe.heads for parameter in head.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (96, 3), (48, 1), (1024, 16)])
def test_heads_divide_the_width(width: int, heads: int) -> None:
    head = AttentiveHead(width, 5)
    assert head.heads == heads
    assert head(torch.randn(2, 7, width)).shape == (2, 5)
