"""Stateless randomness: pure, uniform, and without ties between what should be independent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nepa_scale.counter_random import hash_uniform, hash_words, uniform

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def finalise(value: int) -> int:
    """SplitMix64's output function, from its paper."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def some_keys(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))


# words


def test_known_values() -> None:
    """The first outputs of SplitMix64 seeded with 0 and 1234567, as published; runs must stay reproducible forever."""
    assert hash_words(0) == 0xE220A8397B1DCDAF
    assert hash_words(1234567) == 6457827717110365317
    assert hash_words("mask", 3) == hash_words("mask", 3)


@given(st.lists(st.one_of(st.integers(0, 2**63), st.text(max_size=8)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_words_hash_to_64_bits_and_uniform_to_the_unit_interval(words: list[int | str]) -> None:
    assert 0 <= hash_words(*words) < 2**64
    assert 0.0 <= hash_uniform(*words) < 1.0
    assert hash_words(*words) == hash_words(*words)


def test_order_kind_and_number_of_words_matter() -> None:
    variants = [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), ("1", 2), ("a", "b"), ("ab",), ("b", "a"), (12,)]
    assert len({hash_words(*words) for words in variants}) == len(variants)


def test_no_collisions_over_seeds_epochs_and_samples() -> None:
    hashes = {hash_words(seed, epoch, sample) for seed in range(10) for epoch in range(10) for sample in range(500)}
    assert len(hashes) == 50_000


def test_hash_uniform_is_uniform() -> None:
    draws = torch.tensor([hash_uniform("x", n) for n in range(20_000)])
    histogram = draws.histc(20, 0, 1) / len(draws)
    assert (histogram - 0.05).abs().max() < 5 * (0.05 * 0.95 / len(draws)) ** 0.5


# tensors


@pytest.mark.parametrize("device", DEVICES)
def test_tensor_arithmetic_is_that_of_whole_numbers(device: str) -> None:
    """int64 wraps and shifts on the device as unsigned 64-bit numbers do on paper."""
    keys = some_keys(50)
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    purpose = hash_words("mask", 7)
    expected = []
    for key in keys.tolist():
        state = finalise((key + purpose + gamma) & mask)
        expected.append([(finalise((state + (n + 1) * gamma) & mask) >> 40) * 2.0**-24 for n in range(5)])
    drawn = uniform(keys.to(device), "mask", 7, count=5)
    assert drawn.dtype == torch.float32
    assert drawn.device.type == device
    assert torch.equal(drawn.cpu(), torch.tensor(expected))


def test_a_function_of_key_purpose_and_position() -> None:
    keys = some_keys(1000)
    drawn = uniform(keys, "crop", count=7)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(uniform(keys[order], "crop", count=7), drawn[order])
    assert torch.equal(uniform(keys[100:200], "crop", count=7), drawn[100:200])
    assert torch.equal(uniform(keys, "crop", count=3), drawn[:, :3])
    assert torch.equal(uniform(keys[:1], "crop", count=7), drawn[:1])
    assert uniform(keys[:0], "crop", count=7).shape == (0, 7)
    for others in (
        uniform(keys, "flip", count=7),
        uniform(keys, "crop", 1, count=7),
        uniform(keys + 1, "crop", count=7),
    ):
        assert (others == drawn).float().mean() < 0.001


@pytest.mark.parametrize(
    "keys", [torch.arange(4000), torch.arange(4000) << 32, some_keys(4000)], ids=["low", "high", "any"]
)
def test_moments(keys: Tensor) -> None:
    drawn = uniform(keys, "moments", count=16).double()
    count = drawn.numel()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for power in (1, 2, 3, 4):
        exact, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert (drawn**power).mean().item() == pytest.approx(exact, abs=5 * (variance / count) ** 0.5)
    histogram = drawn.float().histc(64, 0, 1) / count
    assert (histogram - 1 / 64).abs().max() < 5 * (1 / 64 / count) ** 0.5


def test_no_correlation_between_neighbouring_keys_positions_and_purposes() -> None:
    count = 50_000
    keys = torch.arange(count)
    drawn = uniform(keys, "a", count=4)
    columns = [*drawn.unbind(1), uniform(keys + 1, "a").squeeze(1), uniform(keys, "b").squeeze(1), keys.float()]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / count**0.5
