"""What is evaluated on is not what was trained on, and its labels mean the same classes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nepa_scale import train
from nepa_scale.config import Config, ConfigError, DataConfig
from nepa_scale.data.shard_maker import make_shards
from nepa_scale.data.shard_set import ShardSet
from nepa_scale.evaluation.held_out import match_classes, require_other_images
from nepa_scale.evaluation.while_training import make_validation
from nepa_scale.interop import save_official
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier
from nepa_scale.training.run_folder import read_json_lines
from tests.launch import REPOSITORY, TINY, write_shards

COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "grey": (90, 90, 90), "red": (220, 30, 30)}
Program = Callable[..., tuple[int, str, str]]


def colours(folder: Path, names: list[str], seed: int, count: int = 6, *, labelled: bool = True) -> Path:
    """Shards of images of one colour each, whose classes are `names` in this order."""
    random = np.random.default_rng(seed)
    for name in names:
        place = folder / "images" / (name if labelled else "")
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + random.integers(-25, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{name}_{number}.jpg")
    (folder / "list.txt").write_text("\n".join(names))
    listed = folder / "list.txt" if labelled else None
    make_shards(folder / "images", folder / "shards", workers=1, class_list=listed)
    return folder / "shards"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    found = {
        "train": colours(folder / "train", ["blue", "green", "red"], 0),
        "val": colours(folder / "val", ["red", "blue", "green"], 1, 4),
        "some": colours(folder / "some", ["red", "green"], 2, 4),
        "more": colours(folder / "more", ["grey", "red", "blue", "green"], 3, 4),
        "unlabelled": colours(folder / "unlabelled", ["red", "blue", "green"], 4, 4, labelled=False),
        "plain": write_shards(folder / "plain"),
    }
    for name in ("val", "train"):  # the same labels, with nothing that names them
        shutil.copytree(found[name], folder / f"nameless_{name}")
        found[f"nameless_{name}"] = folder / f"nameless_{name}"
        (found[f"nameless_{name}"] / "dataset.json").unlink()
    return found


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    save_official(build_vit("vit_b", 8, 32, seed=1, width=48, depth=2, heads=3, layer_scale=0.1), folder)
    return folder


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """tools/evaluate.py in this process: its status, output and errors."""

    def start(*arguments: object) -> tuple[int, str, str]:
        tool = str(REPOSITORY / "tools" / "evaluate.py")
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments), "--workers", "0"])
        capsys.readouterr()
        status = runpy.run_path(tool)["main"]()
        return status, *capsys.readouterr()

    return start


def opened(source: object) -> ShardSet:
    return ShardSet.open(str(source), DataConfig())


def names_of(shards: ShardSet) -> list[str | None]:
    """The class of each sample, by the name of its key and by that of its label."""
    assert shards.class_names is not None
    by_key, by_label = [], []
    for number in range(len(shards)):
        sample = shards.read(number)
        assert sample.label is not None
        by_key.append(sample.key.split("/")[0])
        by_label.append(shards.class_names[sample.label])
    assert by_key == by_label
    return sorted(set(by_label))


def test_labels_follow_the_names(sets: dict[str, Path]) -> None:
    train = opened(sets["train"])
    for name, classes in (("val", ["blue", "green", "red"]), ("some", ["green", "red"])):
        matched, note = match_classes(opened(sets[name]), name, train.class_names, 3, "train")
        assert matched.class_names == train.class_names == ["blue", "green", "red"]
        assert (names_of(matched), matched.classes, note) == (classes, 3, "")
    with pytest.raises(ConfigError, match=r"^more has classes that training does not know: grey$"):
        match_classes(opened(sets["more"]), "more", train.class_names, 3, "train")


def test_folders_that_are_joined_share_their_classes(sets: dict[str, Path]) -> None:
    joined = opened(f"{sets['train']}::{sets['more']}::{sets['some']}")
    assert joined.class_names == ["blue", "green", "red", "grey"]
    assert joined.classes == 4
    assert names_of(joined) == ["blue", "green", "grey", "red"]
    assert names_of(joined.with_classes(["red", "grey", "green", "blue"], "joined")) == names_of(joined)
    assert opened(f"{sets['train']}::{sets['nameless_val']}").class_names is None


def test_where_one_has_no_names_labels_are_numbers(sets: dict[str, Path]) -> None:
    nameless = opened(sets["nameless_val"])
    matched, note = match_classes(nameless, "val", ["blue", "green", "red"], 3, "train")
    assert (matched, note) == (nameless, "")
    _, note = match_classes(opened(sets["some"]), "val", None, 3, "train")
    assert note == "val has 2 classes and train 3; they are matched by number, as train does not name them"


def test_two_classes_of_one_name_are_not_guessed(tmp_path: Path) -> None:
    make_shards(write_shards(tmp_path / "plain"), tmp_path / "set", workers=1)
    path = tmp_path / "set" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": ["crane", "cat", "crane", "dog"]}))
    shards = opened(tmp_path / "set")
    same, _ = match_classes(shards, "val", ["crane", "cat", "crane", "dog"], 4, "train")
    assert [same.read(n).label for n in range(40)] == [shards.read(n).label for n in range(40)]
    with pytest.raises(ConfigError, match="several have the same name: crane"):
        match_classes(shards, "val", ["cat", "crane", "crane", "dog"], 4, "train")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": 5}))
    with pytest.raises(ConfigError, match="class_names is not a list of names"):
        opened(tmp_path / "set")


def test_most_of_the_same_images_is_refused_and_a_part_is_said() -> None:
    assert require_other_images(0, 10, "data.val", "data.train") == ""
    line = require_other_images(5, 10, "data.val", "data.train")
    assert line == "about 5 of the 10 images of data.val are images of data.train"
    with pytest.raises(ConfigError, match=r"^about 6 of the 10 images of data.val are images of data.train: "):
        require_other_images(6, 10, "data.val", "data.train")
    with pytest.raises(ConfigError, match=r"^all of the 10 images"):
        require_other_images(10, 10, "data.val", "data.train")


def test_a_run_refuses_what_it_trains_on_and_classes_it_does_not_have(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(sets["train"], tmp_path / "again", workers=1, samples_per_shard=5, seed=7)
    finetune = ["task=finetune", f"data.train={sets['train']}"]
    cases = [
        ([f"data.train={sets['train']}", f"data.val={sets['train']}"], "all of the 18 images of data.val"),
        ([f"data.train={sets['train']}", f"data.val={tmp_path}/again"], "all of the 18 images of data.val"),
        ([*finetune, f"data.val={tmp_path}/again"], "all of the 18 images of data.val"),
        ([*finetune, f"data.val={sets['more']}"], "data.val has classes that training does not know: grey"),
        ([f"data.train={sets['train']}", f"data.val={sets['more']}"], "training does not know: grey"),
        ([*finetune, f"data.val={sets['unlabelled']}"], f"data.val={sets['unlabelled']} have none"),
        (["task=finetune", f"data.train={sets['nameless_train']}", f"data.val={sets['more']}"],
         "data.val has 4 classes, and data.train only 3"),
    ]  # fmt: skip
    for words, why in cases:
        assert train.main([*TINY, *words, f"output={tmp_path}/run", "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1


def test_a_run_judges_by_name_and_says_which_images_it_knows(
    sets: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_shards(sets["some"], tmp_path / "known", workers=1, seed=5)  # 8 of the 32 images of data.train
    run = tmp_path / "run"
    words = [
        *TINY, f"data.train={sets['train']}::{tmp_path}/known", f"data.val={sets['val']}::{sets['some']}",
        "train.steps=1", "data.workers=0", "evaluate.probe=true", f"output={run}",
    ]  # fmt: skip
    assert train.main(words) == 0
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if "knn_top1" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["knn_top1"] == row["probe_top1"] == 1.0
        assert row["val_in_train"] == 8 / 20
    assert rows[0]["knn_top1_pixels"] == 1.0
    said = capfd.readouterr()
    assert said.err.startswith("warning: about 8 of the 20 images of data.val are images of data.train\n")
    assert "val_in_train 0.4000" in said.out


def test_images_without_labels_are_used_for_what_needs_none(
    sets: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        *TINY, f"data.train={sets['train']}", f"data.val={sets['unlabelled']}", "train.steps=1", "data.workers=0",
        "evaluate.probe=true", f"output={run}",
    ]  # fmt: skip
    assert train.main(words) == 0
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if "evaluation_seconds" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["features_effective_rank"] > 1
        assert -1 < row["reference_cosine"] <= 1
        assert not {"knn_top1", "probe_top1", "val_in_train", "knn_top1_pixels"} & row.keys()
    assert capfd.readouterr().err.startswith(
        "warning: no labels in data.val: what is evaluated without them is features_effective_rank, reference_cosine\n"
    )
    neither = make_validation(opened(sets["unlabelled"]), opened(sets["unlabelled"]), Config(), 0)
    assert neither.notes == (
        "no labels in data.train and data.val: what is evaluated without them is features_effective_rank",
    )


def test_evaluate_judges_features_by_name(backbone: Path, sets: dict[str, Path], evaluate: Program) -> None:
    common = (backbone, "--train", sets["train"], "--json", "-")
    for name in ("val", "some"):
        status, out, err = evaluate(*common, "--data", sets[name])
        assert (status, err.strip()) == (0, "")
        found = json.loads(out)
        assert found["knn_top1"] == found["probe_top1"] == 1.0
        assert found["val_in_train"] == 0.0
    status, out, _ = evaluate(*common, "--data", sets["nameless_val"], "--no-probe")  # as the labels of train: wrong
    assert (status, json.loads(out)["knn_top1"]) == (0, 0.0)


def test_evaluate_refuses_the_bank_itself(backbone: Path, sets: dict[str, Path], evaluate: Program) -> None:
    common = (backbone, "--train", sets["train"], "--no-probe")
    cases = [
        ((*common, "--data", sets["train"]), f"all of the 18 images of {sets['train']}"),
        ((*common, "--data", sets["nameless_train"]), f"all of the 18 images of {sets['nameless_train']}"),
        ((*common, "--data", sets["more"]), "has classes that training does not know: grey"),
        ((*common, "--data", sets["unlabelled"], "--attentive", 1), f"{sets['unlabelled']} has none"),
    ]
    for arguments, why in cases:
        status, out, err = evaluate(*arguments)
        assert (status, out) == (2, "")
        assert why in err
        assert len(err.splitlines()) == 1
    status, out, err = evaluate(*common[:2], f"{sets['train']}::{sets['some']}", "--no-probe",
                                "--data", f"{sets['val']}::{sets['some']}")  # fmt: skip
    assert status == 0
    assert err.startswith("warning: about 8 of the 20 images of ")
    assert "; 40.0% of the images are training images" in out.splitlines()[0]


def test_evaluate_without_labels_gives_the_effective_rank(
    backbone: Path, sets: dict[str, Path], evaluate: Program
) -> None:
    labelled = json.loads(evaluate(backbone, "--data", sets["val"], "--train", sets["train"], "--json", "-")[1])
    ranks = []
    for arguments in (("--data", sets["unlabelled"]), ("--data", sets["val"], "--train", sets["unlabelled"])):
        status, out, err = evaluate(backbone, *arguments, "--json", "-")
        assert status == 0
        why = "what is evaluated without them is the effective rank"
        assert err.strip() == f"warning: no labels in {sets['unlabelled']}: {why}"
        found = json.loads(out)
        assert not {"knn_top1", "probe_top1"} & found.keys()
        ranks.append(found["effective_rank"])
    assert ranks[0] > 1
    assert ranks[1] == labelled["effective_rank"]


def always_the_second(folder: Path, names: list[str] | None) -> Path:
    """A classifier of three classes in the official layout that says the second of everything."""
    task = Classifier(build_vit("vit_b", 8, 32, seed=1, width=48, depth=2, heads=3, layer_scale=0.1), 3)
    assert task.fc_norm is not None
    for parameter in (*task.head.parameters(), *task.fc_norm.parameters()):
        nn.init.zeros_(parameter)
    with torch.no_grad():
        task.head.bias[1] = 1.0
    save_official(task, folder, class_names=names)
    return folder


def test_a_classifier_is_judged_by_the_names_of_its_classes(
    sets: dict[str, Path], evaluate: Program, tmp_path: Path
) -> None:
    """Its second is blue, of which there is none in `some`; by number it would be half of it."""
    cases = [  # names of the classifier, data, accuracy, what is said
        (["green", "blue", "red"], "some", 0.0, ""),
        (["green", "blue", "red"], "val", 1 / 3, ""),
        (None, "nameless_val", 1 / 3, ""),
        (None, "some", 0.5, "has 2 classes and the classifier 3; they are matched by number, as the classifier does"),
        (["sky", "sea", "sun"], "val", 1 / 3, "and the classifier have other names for 3 classes"),
    ]
    for number, (names, data, top1, said) in enumerate(cases):
        folder = always_the_second(tmp_path / str(number), names)
        status, out, err = evaluate(folder, "--data", sets[data], "--json", "-")
        assert status == 0
        assert json.loads(out)["top1"] == pytest.approx(top1)
        assert json.loads(out)["val_in_train"] is None
        assert said in err if said else "warning" not in err
    named = always_the_second(tmp_path / "named", ["green", "blue", "red"])
    for data, why in (("more", "training does not know: grey"), ("unlabelled", "has no labels")):
        status, _, err = evaluate(named, "--data", sets[data])
        assert status == 2
        assert why in err


def test_the_classifier_of_a_run_knows_its_classes_and_its_images(
    sets: dict[str, Path], evaluate: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [
        *TINY, "task=finetune", f"data.train={sets['train']}", f"data.val={sets['some']}", "train.steps=20",
        "schedule.warmup_steps=1", "data.workers=0", "finetune.weights=null", "optimizer.lr=1e-2",
        "finetune.head_lr=1e-2", "model.layer_scale=1.0", "train.log_every=10", f"output={run}",
    ]  # fmt: skip
    assert train.main(words) == 0
    last = [row for row in read_json_lines(run / "metrics.jsonl") if "top1" in row][-1]
    assert last["top1"] == 1.0
    status, out, err = evaluate(run, "--data", sets["some"], "--json", "-")
    assert (status, "warning" in err) == (0, False)
    assert (json.loads(out)["top1"], json.loads(out)["val_in_train"]) == (1.0, 0.0)
    status, out, err = evaluate(run, "--data", sets["train"])
    assert status == 0
    assert f"warning: all of the 18 images of {sets['train']} are images of the training set " in err
    assert "; 100.0% of the images are training images" in out.splitlines()[0]
