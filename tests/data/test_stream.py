"""The stream end to end: the same samples and pixels whatever the ranks and workers, bad samples replaced."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nepa_scale.config import DataConfig
from nepa_scale.counter_random import hash_words
from nepa_scale.data import BadSample, Batch, DataError, EvaluationStream, RawSample, ShardSet, TrainStream, normalize
from nepa_scale.data.batch import transferred
from nepa_scale.data.order import TrainOrder
from nepa_scale.data.remote import RemoteError
from nepa_scale.data.sample_reader import sample_keys
from tests.data.images import encode, picture

SIZE = (24, 32)
BAD = {3: "cut", 11: "not an image", 20: "no image", 29: "label out of range"}
SAMPLES = 37


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def sample_files(number: int, bad: bool) -> list[tuple[str, bytes]]:
    image, label = encode(picture(50 + number, 60 - number, number), quality=90), number % 5
    trouble = BAD.get(number) if bad else None
    if trouble == "cut":
        image = image[:300]
    if trouble == "not an image":
        image = b"<html>not found</html>"
    if trouble == "label out of range":
        label = 999
    files = [(f"{number:03d}.jpg", image), (f"{number:03d}.cls", str(label).encode())]
    return files[1:] if trouble == "no image" else files


def make_set(folder: Path, bad: bool) -> Path:
    folder.mkdir()
    for shard, first in enumerate(range(0, SAMPLES, 10)):
        numbers = range(first, min(first + 10, SAMPLES))
        write_tar(folder / f"shard-{shard}.tar", [file for n in numbers for file in sample_files(n, bad)])
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(str(make_set(tmp_path_factory.mktemp("sets") / "good", bad=False)), DataConfig())


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    shards = ShardSet.open(str(make_set(tmp_path_factory.mktemp("sets") / "flawed", bad=True)), DataConfig())
    shards.classes = 5  # as dataset.json would say; else the largest label says it
    return shards


def train_stream(shards: Any, rank: int = 0, world_size: int = 1, **options: Any) -> TrainStream:
    data = DataConfig(workers=options.pop("workers", 0), max_bad_fraction=options.pop("max_bad_fraction", 0.5),
                      ragged=options.pop("ragged", "drop"), open_shards=2)  # fmt: skip
    values: dict[str, Any] = {"image_size": SIZE, "global_batch_size": 12, "micro_batch_size": 12, "seed": 5} | options
    return TrainStream(shards, data, rank=rank, world_size=world_size, **values)


def run(shards: Any, steps: int, world_size: int = 1, **options: Any) -> list[Batch]:
    """`steps` global batches, put together from the ranks' micro-batches."""
    whole = []
    micro = options.get("micro_batch_size", 12)
    accumulation = 12 // (world_size * micro)
    streams = [train_stream(shards, rank, world_size, **options) for rank in range(world_size)]
    iterators = [iter(stream) for stream in streams]
    for _ in range(steps):
        whole.append(join([batch for one in iterators for batch in islice(one, accumulation)]))
    for stream in streams:
        stream.close()
    return whole


def join(batches: list[Batch]) -> Batch:
    return Batch(
        *(
            torch.cat([getattr(b, name) for b in batches])
            for name in ("images", "flip", "labels", "sample_keys", "samples")
        ),
        host_keys=np.concatenate([b.host_keys for b in batches]),
        keys=[key for b in batches for key in b.keys],
    )


def same(one: Batch, other: Batch) -> bool:
    names = ("images", "flip", "labels", "sample_keys", "samples")
    return one.keys == other.keys and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.fixture(scope="module")
def uninterrupted(good: ShardSet) -> list[Batch]:
    return run(good, 10)


def test_a_batch_is_what_it_says(good: ShardSet) -> None:
    batch = run(good, 1)[0]
    assert batch.images.shape == (12, 3, *SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == [number % 5 for number in batch.samples.tolist()]
    assert batch.keys == [f"{number:03d}" for number in batch.samples.tolist()]
    assert batch.sample_keys.tolist() == sample_keys(5, 0, batch.samples.numpy()).tolist()
    assert 0 < batch.flip.sum() < 12


@pytest.mark.parametrize(("workers", "world_size", "micro"), [(1, 1, 12), (3, 1, 12), (2, 2, 3), (0, 3, 4), (0, 4, 1)])
def test_nothing_depends_on_ranks_workers_and_micro_batches(
    good: ShardSet, uninterrupted: list[Batch], workers: int, world_size: int, micro: int
) -> None:
    found = run(good, 7, world_size, workers=workers, micro_batch_size=micro)
    assert all(same(one, other) for one, other in zip(found, uninterrupted, strict=False))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 9),
    layout=st.sampled_from([(1, 12), (2, 6), (3, 2), (6, 1)]),
    workers=st.sampled_from([0, 0, 0, 2]),
)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(
    good: ShardSet, uninterrupted: list[Batch], start: int, layout: tuple[int, int], workers: int
) -> None:
    world_size, micro = layout
    found = run(good, 10 - start, world_size, start_step=start, micro_batch_size=micro, workers=workers)
    assert all(same(one, other) for one, other in zip(found, uninterrupted[start:], strict=True))


def test_an_epoch_holds_each_sample_once_and_epochs_differ(good: ShardSet) -> None:
    batches = run(good, 8, ragged="pad")
    epochs = [[key for batch in batches[e * 4 : e * 4 + 4] for key in batch.keys] for e in range(2)]
    for keys in epochs:
        assert sorted(keys[:SAMPLES]) == [f"{number:03d}" for number in range(SAMPLES)]
        assert keys[SAMPLES:] == keys[: 48 - SAMPLES]
    assert epochs[0] != epochs[1]


def test_a_sample_is_cropped_anew_in_each_epoch(uninterrupted: list[Batch]) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in uninterrupted[:6]:  # two epochs
        for key, image in zip(batch.keys, batch.images, strict=True):
            seen.setdefault(key, []).append(image)
    twice = [images for images in seen.values() if len(images) == 2]
    assert len(twice) > 20
    assert not any(torch.equal(*images) for images in twice)


def test_the_augmentation_is_a_function_of_seed_epoch_and_sample(good: ShardSet) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    one = run(good, 2)
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(one, run(good, 2), strict=True))
    other = run(good, 2, seed=6)
    assert not any(same(a, b) for a, b in zip(one, other, strict=True))


def test_a_stream_can_begin_again_and_ends_when_closed(good: ShardSet) -> None:
    stream = train_stream(good, workers=1)
    first = [batch.keys for batch in islice(stream, 3)]
    iterator = iter(stream)
    assert [batch.keys for batch in islice(iterator, 3)] == first
    stream.close()
    assert list(iterator) == []


def test_kept_batches_stay_as_they_were(good: ShardSet, uninterrupted: list[Batch]) -> None:
    stream = train_stream(good, workers=2)
    kept = list(islice(stream, 10))
    stream.close()
    assert all(same(one, other) for one, other in zip(kept, uninterrupted, strict=True))


# bad samples


def test_bad_samples_are_replaced_listed_and_counted(flawed: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    batches = run(flawed, 6, bad_samples_file=path)  # two epochs, of which each leaves one sample out
    numbers = {number for batch in batches for number in batch.samples.tolist()}
    assert not numbers & set(BAD)
    assert all(len(batch.keys) == 12 and batch.samples.min() >= 0 for batch in batches)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == [f"{number:03d}" for number in BAD]
    reasons = {int(row["key"]): row["why"] for row in rows}
    assert "truncated" in reasons[3].lower()
    assert "cannot identify" in reasons[11]
    assert "image" in reasons[20]
    assert "999 is not one of 5 classes" in reasons[29]


def test_substitutes_are_the_same_whatever_reads_them(flawed: ShardSet, tmp_path: Path) -> None:
    expected = run(flawed, 6)
    for world_size, micro, workers, start in ((2, 3, 0, 0), (1, 12, 2, 0), (4, 1, 0, 2)):
        found = run(flawed, 6 - start, world_size, micro_batch_size=micro, workers=workers, start_step=start,
                    bad_samples_file=tmp_path / "bad.jsonl")  # fmt: skip
        assert all(same(one, other) for one, other in zip(found, expected[start:], strict=True))


def test_the_others_are_what_they_are_without_bad_samples(good: ShardSet, flawed: ShardSet) -> None:
    for one, other in zip(run(good, 3), run(flawed, 3), strict=True):
        sound = [row for row, number in enumerate(one.samples.tolist()) if number not in BAD]
        assert torch.equal(one.images[sound], other.images[sound])
        assert torch.equal(one.sample_keys[sound], other.sample_keys[sound])


def test_too_many_bad_samples_stop_the_stream(flawed: ShardSet, tmp_path: Path) -> None:
    stream = train_stream(flawed, max_bad_fraction=0.002, workers=1, bad_samples_file=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"3 of \d+ samples could not be used.*max_bad_fraction=0.002"):
        list(islice(stream, 6))
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) >= 3
    stream.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_usable_sample_is_an_error_and_no_hang(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "shard.tar", [(f"{number}.jpg", b"junk") for number in range(20)])
    shards = ShardSet.open(str(tmp_path), DataConfig())
    stream = train_stream(shards, workers=workers, max_bad_fraction=1.0, bad_samples_file=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="no usable sample"):
        next(iter(stream))
    assert (tmp_path / "bad.jsonl").exists()
    stream.close()


def test_labels_are_needed_only_where_classes_are_given(tmp_path: Path) -> None:
    files = [(f"{number}.jpg", encode(picture(40, 40, number))) for number in range(24)]
    write_tar(tmp_path / "shard.tar", [*files, *((f"{number}.cls", b"1") for number in range(12))])
    shards = ShardSet.open(str(tmp_path), DataConfig())
    assert sorted(run(shards, 1)[0].labels.tolist() + run(shards, 2)[1].labels.tolist()) == [-1] * 12 + [1] * 12
    labelled = run(shards, 2, classes=2)
    assert {label for batch in labelled for label in batch.labels.tolist()} == {1}


# remote shards


class Remote:
    """Behaves as a remote `ShardSet` of which one shard takes long and one cannot be had."""

    remote = True
    classes = None

    def __init__(self, folder: Path, sizes: list[int], dead: int | None = None) -> None:
        self.folder, self.shard_sizes, self.dead = folder, sizes, dead
        self.image = encode(picture(40, 30))

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def ensure_local(self, shard: int) -> None:
        if shard == self.dead:
            raise RemoteError(f"http://host/{shard}.tar: the server is silent")
        with (self.folder / "fetched").open("a") as file:
            file.write(f"{shard}\n")

    def read(self, sample: int) -> RawSample:
        shard = int(np.searchsorted(np.cumsum(self.shard_sizes), sample, side="right"))
        if shard == self.dead:
            raise RemoteError(f"http://host/{shard}.tar: the server is silent")
        with (self.folder / "read").open("a") as file:
            file.write(f"{shard}\n")
        return RawSample(str(sample), self.image, None, str(shard))

    def log(self, name: str) -> list[int]:
        path = self.folder / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_shards_are_fetched_a_window_ahead_and_each_once_an_epoch(tmp_path: Path, workers: int) -> None:
    shards = Remote(tmp_path, [9, 8, 7, 6, 5, 4, 9, 8, 7, 9])  # 72 samples, windows of 2 shards: 6 steps, 5 windows
    stream = train_stream(shards, workers=workers)
    order = TrainOrder(
        shards.shard_sizes, open_shards=2, seed=5, ragged="drop", global_batch_size=12, micro_batch_size=12, rank=0,
        world_size=1,
    )  # fmt: skip
    for number, _ in enumerate(islice(stream, 6)):
        announced = min(10, 2 * (order.window(number)[1] + 2))
        wait_for(lambda least: len(set(shards.log("fetched"))) >= least, announced)
        assert set(shards.log("read")) <= set(shards.log("fetched"))
    stream.close()
    fetched = shards.log("fetched")
    assert sorted(fetched[:10]) == list(range(10))
    assert len(set(fetched[:10])) == 10


def test_a_server_that_fails_is_one_clear_line(tmp_path: Path) -> None:
    for workers in (0, 1):
        stream = train_stream(Remote(tmp_path, [12, 12, 12], dead=1), workers=workers)
        with pytest.raises(DataError, match=r"^http://host/1.tar: the server is silent$"):
            list(islice(stream, 4))
        stream.close()


def wait_for(condition: Callable[[int], bool], argument: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition(argument):
        assert time.monotonic() < end
        time.sleep(0.01)


class Deadly(Remote):
    def read(self, sample: int) -> RawSample:  # noqa: ARG002
        os.abort()


def test_a_worker_that_dies_is_a_clear_error(tmp_path: Path) -> None:
    stream = train_stream(Deadly(tmp_path, [40]), workers=1)
    with pytest.raises(DataError, match=r"killed by SIGABRT.*data.workers"):
        next(iter(stream))
    stream.close()


# evaluation


@pytest.mark.parametrize(("world_size", "batch", "workers"), [(1, 8, 0), (2, 5, 1), (3, 7, 0), (5, 40, 0)])
def test_evaluation_sees_each_sample_once(good: ShardSet, world_size: int, batch: int, workers: int) -> None:
    streams = [
        EvaluationStream(
            good, DataConfig(workers=workers), image_size=SIZE, batch_size=batch, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    ranks = [list(stream) for stream in streams]
    assert {len(batches) for batches in ranks} == {len(stream) for stream in streams}
    assert len({len(batches) for batches in ranks}) == 1
    found = join([batch for batches in zip(*ranks, strict=True) for batch in batches])
    used = found.samples >= 0
    assert found.samples[used].tolist() == list(range(SAMPLES))
    assert found.labels[used].tolist() == [number % 5 for number in range(SAMPLES)]
    assert not found.flip.any()
    assert (found.images[~used] == 0).all()
    assert (found.labels[~used] == -1).all()


def test_evaluation_leaves_bad_samples_out_and_lists_them(flawed: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    data = DataConfig(workers=0, max_bad_fraction=0.5)
    stream = EvaluationStream(flawed, data, image_size=SIZE, batch_size=10, rank=0, world_size=1, bad_samples_file=path)
    found = join(list(stream))
    assert found.samples[found.samples >= 0].tolist() == [n for n in range(SAMPLES) if n not in BAD]
    assert len(path.read_text().splitlines()) == len(BAD)


# on the device


def test_normalisation_mirrors_and_scales() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = normalize(images, torch.tensor([False, True]))
    expected = images.float() / 127.5 - 1
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1], expected[1].flip(-1), atol=1e-6)


def one_after_another(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_transfer_keeps_order_and_content(uninterrupted: list[Batch], device: str) -> None:
    found = list(transferred(one_after_another(uninterrupted), torch.device(device)))
    assert len(found) == len(uninterrupted)
    for one, other in zip(found, uninterrupted, strict=True):
        assert one.images.device.type == device
        assert same(one.to_device(torch.device("cpu")), other)


def test_bad_samples_travel_between_processes() -> None:
    sample = pickle.loads(pickle.dumps(BadSample("shard", "key", "why")))
    assert (sample.shard, sample.key, sample.why) == ("shard", "key", "why")


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), samples=st.lists(st.integers(0, 2**40), max_size=5))
def test_keys_of_many_samples_are_those_of_each(seed: int, epoch: int, samples: list[int]) -> None:
    found = sample_keys(seed, epoch, np.array(samples, dtype=np.int64)).tolist()
    assert [key % 2**64 for key in found] == [hash_words("sample", seed, epoch, sample) for sample in samples]
