"""The order of an epoch: a permutation by arithmetic, whatever the ranks."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_scale.data.order import EpochOrder, Permutation, steps_per_epoch


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_visits_everything_once(size: int, key: int) -> None:
    assert sorted(Permutation(size, key)(np.arange(size))) == list(range(size))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 99), epoch=st.integers(0, 9),
       window=st.one_of(st.none(), st.integers(1, 14)), data=st.data())  # fmt: skip
def test_an_epoch_holds_each_sample_once_and_any_part_of_it_alone(
    sizes: list[int], seed: int, epoch: int, window: int | None, data: st.DataObject
) -> None:
    order = EpochOrder(sizes, seed, epoch, window)
    whole = order.samples(np.arange(order.size))
    assert sorted(whole) == list(range(sum(sizes)))
    some = np.array(data.draw(st.lists(st.integers(0, order.size - 1), min_size=1, max_size=20)))
    assert (EpochOrder(sizes, seed, epoch, window).samples(some) == whole[some]).all()


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=12), window=st.integers(1, 4), epoch=st.integers(0, 5))
def test_remote_shards_are_each_needed_in_one_stretch(sizes: list[int], window: int, epoch: int) -> None:
    order = EpochOrder(sizes, 0, epoch, window)
    shards = np.searchsorted(np.cumsum(sizes), order.samples(np.arange(order.size)), side="right")
    first = [int(np.flatnonzero(shards == s)[0]) for s in range(len(sizes))]
    last = [int(np.flatnonzero(shards == s)[-1]) for s in range(len(sizes))]
    for position in range(order.size):
        assert sum(f <= position <= end for f, end in zip(first, last, strict=True)) <= window


def test_epochs_and_seeds_differ_and_look_random() -> None:
    sizes = [1000] * 20
    orders = [EpochOrder(sizes, seed, epoch).samples(np.arange(20000)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(20000))[0, 1]) < 0.03
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
            assert (one == other).mean() < 0.01


def test_the_middle_of_imagenet_costs_nothing() -> None:
    began = time.perf_counter()
    order = EpochOrder([1252] * 1023 + [371], 0, 7)
    order.samples(np.arange(640_000, 640_256))
    assert time.perf_counter() - began < 1.0  # the promise is a second; it takes about 3 ms


@settings(max_examples=200)
@given(samples=st.integers(1, 500), batch=st.integers(1, 64))
def test_ragged_ends(samples: int, batch: int) -> None:
    assert steps_per_epoch(samples, batch, "drop") == samples // batch
    assert steps_per_epoch(samples, batch, "pad") == -(-samples // batch)
