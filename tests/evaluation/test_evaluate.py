"""tools/evaluate.py: the same result on any number of ranks, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_scale.config import Config, ConfigError, load_config
from nepa_scale.interop import save_official
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier
from tests.launch import REPOSITORY, launcher, write_shards
from tools import evaluate as program

MODEL: dict[str, Any] = {"width": 48, "depth": 3, "heads": 3, "layer_scale": 0.1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "train": write_shards(folder / "train"),
        "val": write_shards(folder / "val", samples=13, seed=9),  # no number of ranks divides it
        "other": write_shards(folder / "other", samples=12, classes=6, seed=9),
    }


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    save_official(build_vit("vit_b", 8, 32, seed=1, **MODEL), folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    task = Classifier(build_vit("vit_b", 8, 32, seed=1, **MODEL), 4)
    with torch.no_grad():
        for parameter in (task.head.weight, task.head.bias):
            parameter.normal_(generator=torch.Generator().manual_seed(2))
        assert task.fc_norm is not None
        task.fc_norm.weight.fill_(1)
        task.fc_norm.bias.zero_()
    save_official(task, folder)
    return folder


def evaluate(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable] if ranks == 1 else launcher("torchrun", ranks)
    tool = str(REPOSITORY / "tools" / "evaluate.py")
    return subprocess.run(
        [*start, tool, *map(str, arguments), "--workers", "1", "--batch-size", "4"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, cwd=REPOSITORY,
    )  # fmt: skip


def result(*arguments: object, ranks: int = 1) -> dict[str, Any]:
    done = evaluate(*arguments, "--json", "-", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    found.pop("seconds")
    return found


@pytest.mark.slow
def test_features_are_judged_alike_on_any_number_of_ranks(backbone: Path, shards: dict[str, Path]) -> None:
    arguments = (backbone, "--data", shards["val"], "--train", shards["train"], "--attentive", 2)
    alone, two = result(*arguments), result(*arguments, ranks=2)
    assert alone == two
    assert {
        "knn_top1",
        "knn10_top1",
        "probe_top1",
        "probe_last_top1",
        "effective_rank",
        "attentive_top1",
    } <= alone.keys()
    assert [row["block"] for row in alone["probe"]] == [1, 2, 3]
    assert alone["probe_top1"] == next(r["top1"] for r in alone["probe"] if r["block"] == alone["probe_block"])
    assert alone["knn_top1"] * 13 == pytest.approx(round(alone["knn_top1"] * 13))


@pytest.mark.slow
def test_a_classifier_is_judged_by_its_accuracy(classifier: Path, shards: dict[str, Path]) -> None:
    alone, two = (result(classifier, "--data", shards["val"], ranks=ranks) for ranks in (1, 2))
    assert alone == two
    assert alone["top5"] == 1.0
    assert alone["top1"] * 13 == pytest.approx(round(alone["top1"] * 13))


def test_images_are_prepared_as_the_run_had_them(tmp_path: Path) -> None:
    def prepared(*options: str, config: Config | None = None) -> Preprocessing:
        arguments = program._parser().parse_args([str(tmp_path), "--data", "data", *options])
        return program.preparation(arguments, config)

    config = load_config("configs/finetune/vit_l14_in1k.yaml")
    assert prepared(config=config) == Preprocessing(0.95, True, "bicubic")
    assert prepared("--crop-share", "1", "--no-squash", config=config) == Preprocessing(1.0, False, "bicubic")
    assert prepared() == prepared(config=load_config(None)) == Preprocessing(0.875, False, "bilinear")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(Preprocessing(0.9, True, "bicubic").for_hugging_face((224, 224))))
    assert prepared("--interpolation", "bilinear") == Preprocessing(0.9, True, "bilinear")
    with pytest.raises(ConfigError, match="must be between"):
        prepared("--crop-share", "1.2")
    file.write_text("[")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        prepared()


def test_refusals_are_one_clear_line(classifier: Path, backbone: Path, shards: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        ((classifier, "--data", shards["other"]), "has 6 classes, and the classifier only 4"),
        ((backbone, "--data", shards["val"]), "give --train: kNN and probe need labelled training shards"),
        ((tmp_path, "--data", shards["val"]), "holds no checkpoint"),
    ]
    for arguments, why in cases:
        done = evaluate(*arguments)
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
