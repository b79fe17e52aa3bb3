"""Linear segmentation: its score, its data, and tools/segment.py on images whose classes are colours."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from nepa_scale import command_line
from nepa_scale.data.segmentation_folder import IGNORED, RandomCrops, Split, WholeImages
from nepa_scale.evaluation.segmentation import (
    DenseFeatures,
    LinearHead,
    SharedBatchNorm,
    confusion_matrix,
    count_pixels,
    predict,
    scores,
    window_starts,
)
from nepa_scale.interop import load_official, save_official
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier
from nepa_scale.sharding import World
from tests.launch import REPOSITORY, TINY, launcher, run_training, write_shards

TOOL = REPOSITORY / "tools" / "segment.py"
COLOURS = np.array([[90, 90, 90], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)  # of labels 0..3
SIDE, PATCH = 32, 4
ALONE = World(0, 1, 0, torch.device("cpu"))


def silent(items: Iterable[Any], _title: str, _count: int) -> Iterator[Any]:
    yield from items


def write_pair(folder: Path, split: str, name: str, label: NDArray[np.uint8]) -> None:
    for kind, pixels, suffix in (("images", COLOURS[label % 4], "jpg"), ("annotations", label, "png")):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / split / f"{name}.{suffix}", quality=95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training images, 5 validation images (no number of ranks divides them), in four sizes."""
    place, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("training", 12), ("validation", 5)):
        for index in range(count):
            height, width = ((48, 72), (64, 48), (40, 40), (36, 100))[index % 4]
            coarse = random.integers(0, 4, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
            label = np.kron(coarse, np.ones((16, 16), np.uint8))[:height, :width]
            write_pair(place, split, f"scene_{index:02}", label)
    return place


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("official")
    save_official(build_vit("vit_b", PATCH, SIDE, seed=1, width=48, depth=2, heads=3, layer_scale=0.1), place)
    return place


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs tools/segment.py here, as it would by itself, but without the seconds of another process's imports."""

    def on_this_rank(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments), "--workers", "0"])
        try:
            status = command_line.run(runpy.run_path(str(TOOL))["main"])
        except SystemExit as exit_:  # argparse's
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return on_this_rank


def on_two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher("torchrun", 2), str(TOOL), *map(str, arguments), "--workers", "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, cwd=REPOSITORY,
    )  # fmt: skip


def test_scores_of_a_matrix_counted_by_hand() -> None:
    found = scores(torch.tensor([[3, 1, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]), first=1)
    assert found["miou"] == pytest.approx((3 / 5 + 4 / 7 + 0) / 3)  # the third class is nowhere
    assert found["mean_accuracy"] == pytest.approx((3 / 4 + 4 / 5 + 0) / 3)
    assert found["pixel_accuracy"] == pytest.approx(7 / 10)
    assert found["per_class"][2] == {"label": 3, "iou": None, "accuracy": None}
    assert found["per_class"][1] == {"label": 2, "iou": pytest.approx(4 / 7), "accuracy": 0.8}


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 7, (50, 40), generator=random, dtype=torch.uint8)
    guess = torch.where(torch.rand(50, 40, generator=random) < 0.6, truth, (truth + 2) % 6)
    truth[torch.rand(50, 40, generator=random) < 0.1] = IGNORED
    found = scores(count_pixels(truth, guess, 7), first=0)
    kept, guessed = truth[truth != IGNORED].numpy(), guess[truth != IGNORED].numpy()
    per_class = metrics.jaccard_score(kept, guessed, labels=range(7), average=None)
    assert [row["iou"] for row in found["per_class"]] == pytest.approx(per_class.tolist())
    assert found["miou"] == pytest.approx(metrics.jaccard_score(kept, guessed, average="macro"))
    assert found["mean_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(kept, guessed))
    assert found["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(kept, guessed))


def test_statistics_are_those_of_batch_norm() -> None:
    ours, torchs = SharedBatchNorm(5), nn.BatchNorm2d(5, affine=False)
    x = torch.randn(4, 5, 40, 40, generator=torch.Generator().manual_seed(0)) * 3 + 7
    for _ in range(3):
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("length", "window"), [(4, 4), (5, 4), (8, 4), (9, 4), (37, 7), (100, 9)])
def test_windows_cover_all_with_as_few_as_can_be(length: int, window: int) -> None:
    starts = window_starts(length, window)
    covered = {place for start in starts for place in range(start, start + window)}
    assert covered == set(range(length))
    assert len(starts) == -(-length // window)


@dataclass(frozen=True)
class Colour:
    """Features that are the mean colour of a patch: what surrounds it, hence the window, does not matter."""

    patch: int = PATCH
    channels: int = 3

    def __call__(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), self.patch)


@pytest.mark.parametrize("size", [(32, 76), (76, 32), (32, 32)])
def test_windows_give_what_the_whole_image_gives(size: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8)
    head = LinearHead(3, 5).eval()
    nn.init.normal_(head.classify.weight, generator=random)
    stored = (size[0] * 2 + 1, size[1] * 2 - 3)
    whole = nn.functional.interpolate(head(Colour()(image[None])), stored, mode="bilinear")[0].argmax(0)
    found = predict(Colour(), head, image, stored)  # type: ignore[arg-type]
    assert found.shape == stored
    assert (found == whole).float().mean() > 0.999  # sums of equal logits round


def test_crops_keep_image_and_labels_together_and_repeat_themselves(folder: Path) -> None:
    split = Split.open(folder, "training", zero_is_ignored=False)
    crops = RandomCrops(split, SIDE, seed=3)
    for number in range(30):
        image, label = crops[number]
        assert image.shape == (3, SIDE, SIDE)
        colours = torch.from_numpy(COLOURS).float()
        nearest = torch.cdist(image.permute(1, 2, 0).flatten(0, 1).float(), colours).argmin(1).view(SIDE, SIDE)
        assert (nearest == label).float().mean() > 0.85  # but for blurred borders
    again, other = RandomCrops(split, SIDE, seed=3), RandomCrops(split, SIDE, seed=4)
    assert torch.equal(again[17][0], crops[17][0])
    assert any(not torch.equal(other[n][0], crops[n][0]) for n in range(3))


def test_every_image_is_drawn_once_an_epoch(tmp_path: Path) -> None:
    for index in range(9):
        write_pair(tmp_path, "training", str(index), np.full((8, 8), index, np.uint8))
    crops = RandomCrops(Split.open(tmp_path, "training", zero_is_ignored=False), 8)
    epochs = [[int(crops[number][1][0, 0]) for number in range(first, first + 9)] for first in (0, 9, 18)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_labels_of_ade20k_begin_at_one(tmp_path: Path) -> None:
    label = np.array([[0, 1], [150, 255]], np.uint8).repeat(4, 0).repeat(4, 1)
    write_pair(tmp_path, "validation", "a", label)
    for ignored, expected in ((True, [255, 0, 149, 255]), (False, [0, 1, 150, 255])):
        _, found = WholeImages(Split.open(tmp_path, "validation", ignored), 8, 4)[0]
        assert found[::4, ::4].flatten().tolist() == expected


def test_it_learns_colours_alike_on_one_and_two_ranks(
    program: Callable[..., tuple[int, str, str]], folder: Path, backbone: Path, tmp_path: Path
) -> None:
    arguments = [backbone, "--data", folder, "--no-zero-is-ignored", "--steps", 60, "--batch-size", 8, "--lr", "1e-2"]
    picture, file = tmp_path / "some.png", tmp_path / "new" / "head.safetensors"
    status, out, err = program(*arguments, "--json", "-", "--plot", picture, "--output", file)
    assert status == 0, err
    alone = json.loads(out)
    assert alone["miou"] > 0.7
    assert alone["classes"] == 4
    with Image.open(picture) as drawn:
        assert drawn.width > 500

    images = WholeImages(Split.open(folder, "validation", zero_is_ignored=False), SIDE, PATCH)
    features = DenseFeatures(load_official(backbone).task.backbone, [block - 1 for block in alone["blocks"]])
    head = LinearHead(features.channels, 4).eval()
    untrained = scores(confusion_matrix(features, head, images, ALONE, 0, silent), 0)
    assert untrained["miou"] < 0.3
    head.load_state_dict(load_file(file))
    counted = confusion_matrix(features, head, images, ALONE, 0, silent)
    assert scores(counted, 0)["miou"] == pytest.approx(alone["miou"], abs=1e-3)
    assert counted.sum() == 2 * 48 * 72 + 64 * 48 + 40 * 40 + 36 * 100  # each pixel once

    done = on_two_ranks(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    assert two["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    for key in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert two[key] == pytest.approx(alone[key], abs=5e-4)


def test_a_classifier_lends_its_backbone(
    program: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    vit = build_vit("vit_b", PATCH, SIDE, seed=1, width=48, depth=2, heads=3, layer_scale=0.1)
    task = Classifier(vit, 4)
    for parameter in (p for name, p in task.named_parameters() if not name.startswith("backbone.")):
        nn.init.zeros_(parameter)
    save_official(task, tmp_path)
    status, out, err = program(tmp_path, "--data", folder, "--steps", 1, "--bidirectional", "--blocks", 2)
    assert status == 0, err
    assert "blocks 2, bidirectional" in out
    assert "3 classes, label 0 ignored" in out


def damage(place: Path, what: str) -> list[object]:
    """Spoils a copy of the folder, and returns further arguments."""
    image, annotation = (place / kind / "training" / "scene_03" for kind in ("images", "annotations"))
    image, annotation = image.with_suffix(".jpg"), annotation.with_suffix(".png")
    match what:
        case "folder":
            shutil.rmtree(place)
        case "split":
            shutil.rmtree(place / "annotations" / "validation")
        case "images":
            shutil.rmtree(place / "images" / "validation")
            (place / "images" / "validation").mkdir()
        case "annotation":
            annotation.unlink()
        case "size":
            Image.fromarray(np.zeros((36, 99), np.uint8)).save(annotation)
        case "cut image":
            image.write_bytes(image.read_bytes()[:300])
        case "cut annotation":
            annotation.write_bytes(annotation.read_bytes()[:60])
        case "colours":
            Image.fromarray(np.zeros((36, 100, 3), np.uint8)).save(annotation)
        case "grey of 4 bits":
            Image.fromarray(np.zeros((36, 100), np.uint8)).save(annotation, bits=4)
        case "tiny":
            write_pair(place, "validation", "tiny", np.zeros((PATCH - 1, 40), np.uint8))
        case "uncounted":
            for path in (place / "annotations" / "validation").iterdir():
                with Image.open(path) as old:
                    size = old.size
                Image.new("L", size).save(path)
        case "classes":
            return ["--classes", 2]
        case "side":
            return ["--side", 30]
        case "blocks":
            return ["--blocks", 3]
        case "picture":
            return ["--plot", "a.xyz"]
        case "known images":
            for kind in ("images", "annotations"):
                shutil.rmtree(place / kind / "validation")
                shutil.copytree(place / kind / "training", place / kind / "validation")
    return []


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("folder", "images/training is not there"),
        ("split", "annotations/validation is not there"),
        ("images", "images/validation holds no images"),
        ("annotation", "scene_03.jpg has no annotation"),
        ("size", "scene_03.png has 99x36 pixels and its image 100x36: they must be the same"),
        ("cut image", "scene_03.jpg cannot be read"),
        ("cut annotation", "scene_03.png cannot be read"),
        ("colours", "scene_03.png is not an 8-bit PNG with one channel of class numbers"),
        ("grey of 4 bits", "scene_03.png is not an 8-bit PNG with one channel of class numbers"),
        ("tiny", "tiny.jpg has 40x3 pixels, less than a patch (4)"),
        ("uncounted", "no pixel counts in the annotations of"),
        ("classes", "has label 3, and 2 classes are 1..2"),
        ("side", "--side 30 does not divide into patches of 4"),
        ("blocks", "--blocks must be between 1 and 2"),
        ("picture", "--plot a.xyz must be named .png"),
        ("known images", "images/validation are images of"),
    ],
)
def test_refusals_are_one_clear_line(
    program: Callable[..., tuple[int, str, str]], folder: Path, backbone: Path, tmp_path: Path, what: str, why: str
) -> None:
    place = tmp_path / "scenes"
    shutil.copytree(folder, place)
    status, out, err = program(backbone, "--data", place, *damage(place, what), "--steps", 2)
    assert status == 2
    assert not out
    assert why in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_file_of_the_other_rank_stops_both(folder: Path, backbone: Path, tmp_path: Path) -> None:
    place = tmp_path / "scenes"
    shutil.copytree(folder, place)
    damage(place, "cut image")  # the fourth: rank 1 reads it
    done = on_two_ranks(backbone, "--data", place)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines, done.stderr[-2000:]  # one at least: the launcher ends the second rank as soon as the first is gone
    assert all("scene_03.jpg cannot be read" in line for line in lines)


@pytest.mark.slow
def test_a_run_folder_has_two_sets_of_weights(
    program: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    shards, run = write_shards(tmp_path / "shards"), tmp_path / "run"
    done = run_training([*TINY, f"data.train={shards}", f"output={run}", "checkpoint.every=6"])
    assert done.returncode == 0, done.stderr[-2000:]
    for weights in ("raw", "ema"):
        status, out, err = program(run, "--data", folder, "--steps", 2, "--weights", weights)
        assert status == 0, err
        assert f"({weights} weights), blocks 1, 2, causal, 32 pixels" in out
