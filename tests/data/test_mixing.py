"""Erasing, mixup and cutmix against timm's: the same arithmetic, and draws of the same distribution."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing

from nepa_scale.config import CHOICES, AugmentConfig, ConfigError
from nepa_scale.counter_random import hash_array
from nepa_scale.data import mixing
from nepa_scale.data.mixing import Mixing, draw_erased, draw_mixes

H, W, CLASSES = 24, 40, 5
RECIPE = AugmentConfig(erase=0.25, mixup=0.8, cutmix=1.0)


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return hash_array(np.arange(count), "test", seed)


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms_for_the_same_draws(monkeypatch: pytest.MonkeyPatch, mixup: float, cutmix: float) -> None:
    theirs = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=CLASSES)
    ours = Mixing(AugmentConfig(mixup=mixup, cutmix=cutmix), CLASSES, 6, 0)
    order = torch.tensor([0, 5, 1, 4, 2, 3])  # theirs mixes the first with the last, ours neighbours
    for seed in range(20):
        images, labels = images_of(6), torch.tensor([1, 4, 2, 0, 0, 3])
        np.random.seed(seed)
        share, cuts = theirs._params_per_batch()
        box = (0, 0, 0, 0)
        if cuts:
            box, share = cutmix_bbox_and_lam(images.shape, share)
        monkeypatch.setattr(mixing, "draw_mixes", lambda *_, b=box, s=share: (np.array([b] * 6), np.array([s] * 6)))
        found, targets = ours(images[order], labels[order], keys_of(6), 0)
        np.random.seed(seed)
        expected, expected_targets = theirs(images.clone(), labels)
        torch.testing.assert_close(found, expected[order])
        torch.testing.assert_close(targets, expected_targets[order].to(targets.dtype))


def test_shares_and_boxes_are_distributed_as_timms() -> None:
    np.random.seed(0)
    theirs = Mixup(mixup_alpha=RECIPE.mixup, cutmix_alpha=RECIPE.cutmix)
    their_shares, their_corners = [], []
    for _ in range(3000):
        share, cuts = theirs._params_per_batch()
        if cuts:
            (top, _, left, _), share = cutmix_bbox_and_lam((H, W), share)
            their_corners.append(top * W + left)
        their_shares.append(share)
    boxes, shares = draw_mixes(keys_of(3000), H, W, RECIPE)
    assert stats.ks_2samp(shares, their_shares).pvalue > 0.01
    pasted = boxes[boxes[:, 1] > boxes[:, 0]]
    assert stats.ks_2samp(pasted[:, 0] * W + pasted[:, 2], their_corners).pvalue > 0.01
    assert abs(len(pasted) / 3000 - 0.5) < 0.05


def shares_of(mode: str, step: int, seed: int = 0, keys: np.ndarray | None = None) -> np.ndarray:
    """The own shares of 8 images whose labels all differ from their neighbours'."""
    labels = torch.arange(8) % 2
    recipe = AugmentConfig(mixup=0.8, cutmix=1.0, mix_mode=mode)
    _, targets = Mixing(recipe, 2, 8, seed)(images_of(8), labels, keys_of(8) if keys is None else keys, step)
    return targets[torch.arange(8), labels].numpy()


def test_a_batch_has_one_share_and_pairs_have_their_own() -> None:
    assert len(set(shares_of("batch", 3))) == 1
    assert len({shares_of("batch", step)[0] for step in range(20)}) == 20
    assert (shares_of("batch", 3, keys=keys_of(8, seed=1)) == shares_of("batch", 3)).all()
    assert (shares_of("batch", 3, seed=1) != shares_of("batch", 3)).all()
    pairs = shares_of("pair", 3)
    assert (pairs[0::2] == pairs[1::2]).all()
    assert len(set(pairs)) == 4
    assert (shares_of("pair", 4, seed=1) == pairs).all()
    cut = [
        (draw_mixes(hash_array(np.array([step]), "mixed batch", 0), H, W, RECIPE)[0] > 0).any() for step in range(400)
    ]
    assert abs(np.mean(cut) - 0.5) < 0.08


def test_what_is_erased_is_distributed_as_timms() -> None:
    random.seed(0)
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")
    expected = [float((theirs(torch.full((1, H, W), 9.0)) != 9.0).sum()) for _ in range(4000)]
    top, bottom, left, right = draw_erased(keys_of(4000), H, W, 0.25).T
    found = (bottom - top) * (right - left)
    assert abs((found > 0).mean() - 0.25) < 0.02
    assert stats.ks_2samp(found[found > 0], [area for area in expected if area > 0]).pvalue > 0.01
    assert bottom.max() <= H
    assert right.max() <= W


def test_erased_parts_become_noise_and_the_rest_stays() -> None:
    images, keys = images_of(64) * 0 + 9, keys_of(64)
    found, targets = Mixing(AugmentConfig(erase=1.0), CLASSES, 1, 0)(images, torch.arange(64) % CLASSES, keys, 0)
    noise = found[found != 9]
    assert 0.05 < noise.numel() / found.numel() < 0.3
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert targets.argmax(1).tolist() == [number % CLASSES for number in range(64)]
    inside = (found != 9).all(dim=1)
    for row, (top, bottom, left, right) in enumerate(draw_erased(keys, H, W, 1.0)):
        assert inside[row].sum() == (bottom - top) * (right - left)
        assert inside[row, top:bottom, left:right].all()


@pytest.mark.parametrize("mode", CHOICES["augment.mix_mode"])
def test_the_same_for_any_division_into_micro_batches(mode: str) -> None:
    recipe = dataclasses.replace(RECIPE, mix_mode=mode)
    images, labels, keys = images_of(8), torch.arange(8) % CLASSES, keys_of(8)
    whole = Mixing(recipe, CLASSES, 8, 0)(images, labels, keys, 5)
    for size in (2, 4):
        parts = [
            Mixing(recipe, CLASSES, size, 0)(images[i : i + size], labels[i : i + size], keys[i : i + size], 5)
            for i in range(0, 8, size)
        ]
        for number in (0, 1):
            assert torch.equal(whole[number], torch.cat([part[number] for part in parts]))
    assert torch.allclose(whole[1].sum(1), torch.ones(8))
    assert not torch.equal(whole[0], Mixing(recipe, CLASSES, 8, 0)(images, labels, keys_of(8, seed=1), 6)[0])


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    images, labels = images_of(3), torch.tensor([0, 4, 2])
    found, targets = Mixing(AugmentConfig(), CLASSES, 3, 0)(images, labels, keys_of(3), 0)
    assert torch.equal(found, images)
    assert targets.argmax(1).tolist() == labels.tolist()


def test_pairs_need_an_even_micro_batch() -> None:
    with pytest.raises(ConfigError, match="micro-batch holds 3: set an even"):
        Mixing(RECIPE, CLASSES, 3, 0)
