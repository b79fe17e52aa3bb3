"""The demo's data: the photographs are found, and what is validated on was never trained on."""

from __future__ import annotations

import importlib.util
import io
import runpy
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nepa_scale.config import ConfigError
from nepa_scale.data import photographs
from nepa_scale.data.photographs import PHOTOGRAPHS, SIDE, crops, load_photographs

ROOT = Path(__file__).parents[2]
HAS_SKIMAGE = importlib.util.find_spec("skimage") is not None
needs_skimage = pytest.mark.skipif(not HAS_SKIMAGE, reason="scikit-image is not installed: nepa_scale[demo]")
SIZES = [(512, 512), (451, 300), (300, 451), (100, 40)]


def columns(width: int, height: int) -> Image.Image:
    """A picture whose red channel tells the column, in steps of `width` / 256."""
    row = (np.arange(width) * 256 // width).astype(np.uint8)
    return Image.fromarray(np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2))


def seen_columns(photograph: Image.Image, split: str) -> tuple[int, int]:
    """The lowest and highest column value among many crops; the resampling overshoots by at most a few."""
    values = [np.asarray(crop)[:, :, 0] for crop in crops(photograph, split, 300, seed=0)]
    return min(int(v.min()) for v in values), max(int(v.max()) for v in values)


@pytest.mark.parametrize("size", SIZES)
def test_training_and_validation_crops_share_no_pixel(size: tuple[int, int]) -> None:
    photograph = columns(*size)
    train_low, train_high = seen_columns(photograph, "train")
    val_low, val_high = seen_columns(photograph, "val")
    assert train_high < val_low
    # and each split's part is used from end to end
    assert train_low <= 12
    assert val_high >= 243
    assert train_high >= 0.52 * 256
    assert val_low <= 0.72 * 256


def test_a_crop_is_a_square_of_its_photograph() -> None:
    """Nothing is stretched: a crop spans as many rows as columns."""
    rows, cols = np.mgrid[:300, :451]
    photograph = Image.fromarray(np.stack([cols / 2, rows / 2, cols * 0], axis=2).astype(np.uint8))
    for crop in crops(photograph, "train", 50, seed=3):
        spans = np.ptp(np.asarray(crop, dtype=int), axis=(0, 1))
        assert abs(spans[0] - spans[1]) <= 4
        assert spans[2] == 0


def test_crops_vary_in_scale_and_half_are_mirrored() -> None:
    spans, rising = [], 0
    for crop in crops(columns(512, 512), "train", 400, seed=1):
        row = np.asarray(crop)[0, :, 0].astype(int)
        spans.append(np.ptp(row))
        rising += bool(row[-1] > row[0])
    assert max(spans) > 2.5 * min(spans)
    assert 150 < rising < 250


def test_crops_are_a_function_of_the_seed() -> None:
    def made(split: str, seed: int) -> list[bytes]:
        return [crop.tobytes() for crop in crops(columns(400, 300), split, 5, seed)]

    assert made("train", 0) == made("train", 0)
    assert made("train", 0) != made("train", 1)
    assert len(set(made("train", 0))) == 5


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"astronaut": ("no_such_package", "astronaut.png")})
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install 'nepa_scale\[demo\]'"):
        load_photographs()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"lena": ("matplotlib", "mpl-data/sample_data/lena.png")})
    with pytest.raises(ConfigError, match=r"lena\.png is missing"):
        load_photographs()


@needs_skimage
def test_the_photographs_are_there() -> None:
    found = load_photographs()
    assert list(found) == list(PHOTOGRAPHS)
    assert len({picture.tobytes() for picture in found.values()}) == len(PHOTOGRAPHS)
    for picture in found.values():
        assert picture.mode == "RGB"
        assert min(picture.size) >= 300
        assert np.asarray(picture).std() > 10


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Runs the tool here (a process of its own would import torch each time) and gives its exit status."""
    main = runpy.run_path(str(ROOT / "tools" / "make_demo_data.py"))["main"]

    def run(output: Path) -> int:
        arguments = ["make_demo_data.py", "--output", str(output), "--train", "6", "--val", "2"]
        monkeypatch.setattr(sys, "argv", arguments)
        return main()

    return run


def read_samples(folder: Path) -> dict[str, bytes]:
    files = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                files[member.name] = content.read()
    return files


@needs_skimage
def test_prepared_shards_hold_each_photograph_equally(prepare: Callable[[Path], int], tmp_path: Path) -> None:
    assert prepare(tmp_path / "demo") == 0
    for split, each in (("train", 6), ("val", 2)):
        samples = read_samples(tmp_path / "demo" / split)
        labels = Counter(content for name, content in samples.items() if name.endswith(".cls"))
        assert labels == {str(label).encode(): each for label in range(len(PHOTOGRAPHS))}
        images = [Image.open(io.BytesIO(content)) for name, content in samples.items() if name.endswith(".jpg")]
        assert {(image.size, image.mode) for image in images} == {((SIDE, SIDE), "RGB")}


@needs_skimage
def test_prepared_once_and_again_where_a_shard_is_damaged(
    prepare: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path / "demo") == 0
    shard = next((tmp_path / "demo" / "val").glob("*.tar"))
    whole, written = shard.read_bytes(), shard.stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(tmp_path / "demo") == 0
    assert "already there" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == written

    shard.write_bytes(whole[:1000])
    assert prepare(tmp_path / "demo") == 0
    assert shard.read_bytes() == whole


@needs_skimage
def test_a_folder_of_other_shards_is_left_alone(
    prepare: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "demo" / "val" / "mine.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    assert prepare(tmp_path / "demo") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert foreign.read_bytes() == b"precious"
