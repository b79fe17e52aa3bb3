"""The order of an epoch: a permutation by arithmetic, whatever the ranks."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nepa_scale.config import ConfigError
from nepa_scale.data.order import PADDING, EpochOrder, EvaluationOrder, Permutation, TrainOrder, steps_per_epoch


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


def test_an_order_is_computed_where_it_is_asked_and_never_stored() -> None:
    """The middle of an epoch costs the same memory whatever the epoch's size, and far less than its permutation."""

    def peak(samples_per_shard: int) -> int:
        tracemalloc.start()
        try:
            order = EpochOrder([samples_per_shard] * 1024, 0, 7)
            order.samples(np.arange(order.size // 2, order.size // 2 + 256))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    imagenet = peak(1251)
    assert imagenet < 1281 * 1000  # a byte a sample; a stored permutation takes four or eight
    assert peak(1251 * 10**6) == pytest.approx(imagenet, rel=0.2)


@settings(max_examples=200)
@given(samples=st.integers(1, 500), batch=st.integers(1, 64))
def test_ragged_ends(samples: int, batch: int) -> None:
    assert steps_per_epoch(samples, batch, "drop") == samples // batch
    assert steps_per_epoch(samples, batch, "pad") == -(-samples // batch)


def train_order(
    sizes: list[int], batch: int, micro: int, rank: int = 0, world_size: int = 1, **options: Any
) -> TrainOrder:
    values: dict[str, Any] = {"seed": 0, "ragged": "drop", "open_shards": None} | options
    return TrainOrder(
        sizes, global_batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world_size, **values
    )


def global_batches(
    sizes: list[int], batch: int, world_size: int, micro: int, steps: range, **options: Any
) -> list[list[int]]:
    """The samples of each step, put together from what each rank would read."""
    ranks = [train_order(sizes, batch, micro, rank, world_size, **options) for rank in range(world_size)]
    accumulation = batch // (world_size * micro)
    return [
        [
            int(sample)
            for order in ranks
            for number in range(step * accumulation, (step + 1) * accumulation)
            for sample in order.place(number).samples
        ]
        for step in steps
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A global batch, and two ways (ranks, micro-batch) to spread it."""
    batch = draw(st.sampled_from([1, 2, 4, 6, 12, 24]))
    ways = [(w, m) for w in range(1, batch + 1) for m in range(1, batch + 1) if batch % (w * m) == 0]
    return batch, [draw(st.sampled_from(ways)), draw(st.sampled_from(ways))]


sets_of_shards = st.lists(st.integers(1, 30), min_size=1, max_size=8)
windows = st.one_of(st.none(), st.integers(1, 9))


@settings(deadline=None)
@given(sizes=sets_of_shards, layout=layouts(), window=windows, seed=st.integers(0, 99),
       ragged=st.sampled_from(["drop", "pad"]), killed_at=st.integers(0, 30), more=st.integers(1, 6))  # fmt: skip
def test_a_run_resumed_on_other_ranks_sees_what_the_uninterrupted_one_would_have(
    sizes: list[int],
    layout: tuple[int, list[tuple[int, int]]],
    window: int | None,
    seed: int,
    ragged: str,
    killed_at: int,
    more: int,
) -> None:
    batch, (before, after) = layout
    if steps_per_epoch(sum(sizes), batch, ragged) == 0:
        return
    options: dict[str, Any] = {"open_shards": window, "seed": seed, "ragged": ragged}
    whole = global_batches(sizes, batch, 1, batch, range(killed_at + more), **options)
    resumed = global_batches(sizes, batch, *before, range(killed_at), **options)
    resumed += global_batches(sizes, batch, *after, range(killed_at, killed_at + more), **options)
    assert resumed == whole


@settings(deadline=None)
@given(sizes=sets_of_shards, layout=layouts(), window=windows, seed=st.integers(0, 99),
       ragged=st.sampled_from(["drop", "pad"]), epoch=st.integers(0, 5))  # fmt: skip
def test_every_sample_comes_once_in_an_epoch(
    sizes: list[int], layout: tuple[int, list[tuple[int, int]]], window: int | None, seed: int, ragged: str, epoch: int
) -> None:
    batch, (way, _) = layout
    count = sum(sizes)
    steps = steps_per_epoch(count, batch, ragged)
    if steps == 0:
        return
    batches = global_batches(
        sizes, batch, *way, range(epoch * steps, (epoch + 1) * steps), open_shards=window, seed=seed, ragged=ragged
    )
    seen = [sample for one in batches for sample in one]
    if ragged == "drop":
        assert len(seen) == len(set(seen)) == count - count % batch
    else:
        assert sorted(seen[:count]) == list(range(count))
        repeated = seen[count:]
        assert len(repeated) == -count % batch
        assert repeated == [seen[place % count] for place in range(len(repeated))]


@given(
    sizes=sets_of_shards, window=windows, epoch=st.integers(0, 3), place=st.floats(0, 0.999), attempt=st.integers(1, 9)
)
def test_a_substitute_comes_from_the_same_window(
    sizes: list[int], window: int | None, epoch: int, place: float, attempt: int
) -> None:
    order = EpochOrder(sizes, 0, epoch, window)
    position = int(place * order.size)
    sample = order.substitute(position, attempt)
    assert sample == EpochOrder(sizes, 0, epoch, window).substitute(position, attempt)
    shard = int(np.searchsorted(np.cumsum(sizes), sample, side="right"))
    assert shard in order.shards_of_window(order.window(position))


def test_substitutes_differ() -> None:
    order = EpochOrder([1000], 0, 0)
    assert len({order.substitute(position, attempt) for position in range(20) for attempt in range(1, 6)}) > 85


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"10 samples.*ragged=pad"):
        train_order([10], 16, 16)
    with pytest.raises(ConfigError, match="does not divide"):
        train_order([100], 16, 3)
    assert train_order([10], 16, 16, ragged="pad").steps_per_epoch == 1


def test_the_state_that_travels_to_a_worker_is_small() -> None:
    order = train_order([1252] * 1024, 4096, 64)
    order.place(10**6)
    assert len(pickle.dumps(order)) < 100_000


@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 9),
    world_size=st.integers(1, 5),
    limit=st.one_of(st.none(), st.integers(1, 70)),
)
def test_evaluation_sees_each_sample_once_over_all_ranks(
    samples: int, batch: int, world_size: int, limit: int | None
) -> None:
    orders = [
        EvaluationOrder(samples, batch_size=batch, rank=rank, world_size=world_size, limit=limit)
        for rank in range(world_size)
    ]
    assert len({order.batches for order in orders}) == 1
    places = [order.place(number) for number in range(orders[0].batches) for order in orders]
    assert {len(place.samples) for place in places} == {batch}
    seen = np.concatenate([place.samples for place in places])
    seen = seen[seen != PADDING]
    assert (np.diff(seen) > 0).all()
    assert len(seen) == min(samples, limit or samples)
    gaps = set(np.diff([*seen, samples]).tolist())  # evenly spread: from the first sample to the last
    assert seen[0] == 0
    assert gaps <= {samples // len(seen), -(-samples // len(seen))}
    if limit is None or limit >= samples:
        assert seen.tolist() == list(range(samples))
