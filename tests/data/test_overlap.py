"""Images of one set in another: found by their bytes, however they are sharded and named."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from nepa_scale.config import DataConfig
from nepa_scale.data import overlap
from nepa_scale.data.overlap import ImageFiles, same_images, same_samples
from nepa_scale.data.shard_maker import make_shards
from nepa_scale.data.shard_set import ShardSet
from nepa_scale.data.shard_writer import SourceSample, write_shard
from tests.launch import write_shards


def opened(source: Path | str) -> ShardSet:
    return ShardSet.open(str(source), DataConfig())


def write(folder: Path, samples: dict[str, bytes], per_shard: int = 16) -> Path:
    folder.mkdir()
    items = [SourceSample(key, image, 0) for key, image in samples.items()]
    for first in range(0, len(items), per_shard):
        write_shard(folder / f"s-{first:06d}.tar", iter(items[first : first + per_shard]))
    return folder


def images(count: int, seed: int, size: int | None = None) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [random.bytes(size or int(random.integers(70, 400))) for _ in range(count)]


def named(content: list[bytes], name: str = "{:05d}") -> dict[str, bytes]:
    return {name.format(number): image for number, image in enumerate(content)}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "train")


def test_a_set_is_found_in_itself_and_in_its_copies(train: Path, tmp_path: Path) -> None:
    shutil.copytree(train, tmp_path / "copy")
    make_shards(train, tmp_path / "again", samples_per_shard=7, workers=1, seed=3)  # under the same keys
    for other in (train, tmp_path / "copy", tmp_path / "again", f"{tmp_path}/again::{train}"):
        assert same_samples(opened(other), opened(train)) == len(opened(other))
        assert same_samples(opened(train), opened(other)) == 40


def test_sets_that_number_their_images_alike_have_none_in_common(train: Path, tmp_path: Path) -> None:
    assert same_samples(opened(write_shards(tmp_path / "val", seed=1)), opened(train)) == 0
    # not even where all images have one size, as uncompressed ones do
    one, two = (write(tmp_path / f"plain{seed}", named(images(30, seed, 192))) for seed in (1, 2))
    assert same_samples(opened(one), opened(two)) == 0


def test_parts_are_counted(tmp_path: Path) -> None:
    content, other = images(40, 0), images(40, 1)
    training = opened(write(tmp_path / "train", named(content)))
    subset = opened(write(tmp_path / "subset", dict(list(named(content).items())[5:17]), 5))
    assert same_samples(subset, training) == 12
    mixed = named(other) | {f"{number:05d}": content[number] for number in range(9)}
    assert same_samples(opened(write(tmp_path / "mixed", mixed)), training) == 9


@pytest.mark.parametrize("size", [None, 192], ids=["sizes differ", "one size"])
def test_other_names_hide_nothing(tmp_path: Path, size: int | None) -> None:
    content = images(40, 0, size)
    training = opened(write(tmp_path / "train", named(content)))
    for name, order in (("photo_{:03d}", content), ("{:05d}", content[::-1])):
        val = opened(write(tmp_path / name[:5].strip("{"), named(order, name)))
        assert same_samples(val, training) == 40, name


def test_the_end_of_an_image_is_not_the_image(tmp_path: Path) -> None:
    content = [bytes([number]) * 50 + bytes(100) for number in range(20)]
    other = [bytes([number + 100]) * 50 + bytes(100) for number in range(20)]
    sets = [opened(write(tmp_path / str(n), named(one))) for n, one in enumerate((content, other))]
    assert same_samples(*sets) == 0


def test_a_share_of_many_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "COMPARED", 50)
    content = images(400, 0)
    training = opened(write(tmp_path / "train", named(content), 100))
    half = [image if number % 2 else image[::-1] for number, image in enumerate(content)]
    val = opened(write(tmp_path / "val", named(half, "other_{:04d}"), 100))
    assert same_samples(val, training) == pytest.approx(200, abs=60)
    assert same_samples(training, training) == 400


def test_remote_shards_are_told_by_url_and_checksum_and_never_fetched(tmp_path: Path) -> None:
    """Nobody answers at this address: what is fetched would fail."""
    make_shards(write_shards(tmp_path / "plain"), tmp_path / "train", workers=1, samples_per_shard=10)
    make_shards(write_shards(tmp_path / "other", seed=1), tmp_path / "val", workers=1, samples_per_shard=10)
    train, val = opened(tmp_path / "train"), opened(tmp_path / "val")
    for far in (train, val):
        far.names = [f"https://127.0.0.1:9/{Path(name).name}" for name in far.names]
        far.descriptions = {f"https://127.0.0.1:9/{Path(name).name}": one for name, one in far.descriptions.items()}
    assert same_samples(train, opened(tmp_path / "train")) == 40
    assert same_samples(opened(tmp_path / "train"), train) == 40
    val.names = [f"{name}?" for name in val.names]
    assert same_samples(val, train) == 0


def test_damaged_and_missing_shards_are_no_obstacle(tmp_path: Path) -> None:
    make_shards(write_shards(tmp_path / "plain"), tmp_path / "train", workers=1, samples_per_shard=10)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    names = [tmp_path / "val" / f"shard-{number:06d}.tar" for number in range(4)]
    (tmp_path / "val" / "dataset.json").rename(tmp_path / "described.json")
    names[1].unlink()
    names[2].write_bytes(names[2].read_bytes()[:3000])
    names[3].write_bytes(b"")
    cut = len(opened(names[2])) - 1
    assert same_samples(opened(f"{tmp_path}/val/shard-{{000000..000003}}.tar"), opened(tmp_path / "train")) == 10 + cut
    description = json.loads((tmp_path / "described.json").read_text())
    for shard in description["shards"]:
        shard["sha256"] = ""  # as of shards that nobody summed: no shard is another for that
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(description))
    for number, name in enumerate(names):
        write_shard(tmp_path / "other" / name.name, iter([SourceSample(f"{number}", images(1, number)[0], 0)]))
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(description))
    assert same_samples(opened(tmp_path / "other"), opened(tmp_path / "train")) == 0


def test_image_files(tmp_path: Path) -> None:
    for folder, names in (("training", "abcdef"), ("validation", "xcdyz")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.jpg").write_bytes(name.encode() * 100)
    training, validation = (ImageFiles(sorted((tmp_path / name).iterdir())) for name in ("training", "validation"))
    assert same_images(validation, training) == 2


@pytest.mark.slow
def test_an_imagenet_is_compared_in_seconds(tmp_path: Path) -> None:
    """1.28 million samples: as many indices as ImageNet has, all of one shard that lies there under many names."""
    first = write(tmp_path / "train", named(images(1000, 0), "n01440764/n01440764_{}"), 1000) / "s-000000.tar"
    train = ShardSet.open("::".join([str(first)] * 1280), DataConfig())
    val = opened(write(tmp_path / "val", named(images(5_000, 1)), 1000))
    assert len(train) == 1_280_000
    began = time.monotonic()
    assert same_samples(val, train) == 0
    assert time.monotonic() - began < 20
