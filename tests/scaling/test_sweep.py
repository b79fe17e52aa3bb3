"""tools/sweep.py: a grid planned from FLOPs, run by the real program, and gone on with after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nepa_scale.profiling import count_flops
from nepa_scale.scaling.sweep import plan_runs, read_sweep
from tests.launch import REPOSITORY, TINY, write_shards

TOOL = [sys.executable, str(REPOSITORY / "tools" / "sweep.py")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def tiny() -> dict[str, Any]:
    pairs = (word.split("=", 1) for word in TINY)
    return {key: yaml.safe_load(value) for key, value in pairs if key not in ("train.steps", "schedule.warmup_steps")}


def write_sweep(tmp_path: Path, **changes: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "base.yaml").write_text("{}\n")
    values: dict[str, Any] = {
        "base": str(tmp_path / "base.yaml"),
        "output": str(tmp_path / "runs"),
        "warmup": 0.25,
        "sizes": {"small": {"model.depth": 1}, "large": {"model.depth": 2}},
        "samples": [32],
        "overrides": tiny() | {"data.train": str(write_shards(tmp_path / "shards")), "checkpoint.every": 1},
    } | changes
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return tmp_path / "sweep.yaml"


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOOL, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, cwd=REPOSITORY
    )


def test_budgets_become_steps_by_their_flops(tmp_path: Path) -> None:
    runs = plan_runs(read_sweep(write_sweep(tmp_path, samples=None, budgets=["1e9", 3e9], seeds=[0, 1])))
    assert len(runs) == 2 * 2 * 2
    for of_one_seed in (runs[:4], runs[4:]):
        assert len({run.overrides["train.seed"] for run in of_one_seed}) == 1
        assert [run.flops for run in of_one_seed] == sorted(run.flops for run in of_one_seed)
    for run in runs:
        model = {"width": 48, "depth": run.overrides["model.depth"], "heads": 3, "layer_scale": 0.1}
        per_image = count_flops(size="vit_b", patch_size=8, image_size=32, **model).train_flops_per_image
        assert run.flops == pytest.approx(run.samples * per_image)
        budget = float(run.name.split("-", 1)[1].rsplit("-", 1)[0])
        assert budget - 8 * per_image < run.flops <= budget  # by less than a step
        assert run.overrides["schedule.warmup_steps"] == round(0.25 * run.steps)
    assert len({run.folder for run in runs}) == len(runs)


def test_a_sweep_runs_and_finds_its_runs_again(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    planned = json.loads(sweep(path, "--dry-run", "--json", "-").stdout)
    assert [run["finished"] for run in planned["runs"]] == [False, False]
    assert not (tmp_path / "runs").exists()
    done = sweep(path, "--jobs", 2, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == {}
    assert all(run["finished"] and run["loss"] < 0 < run["one_plus_loss"] for run in found["runs"])
    changed = {run["folder"]: os.stat(Path(run["folder"]) / "metrics.jsonl").st_mtime_ns for run in found["runs"]}
    assert json.loads(sweep(path, "--json", "-").stdout) == found
    assert changed == {folder: os.stat(Path(folder) / "metrics.jsonl").st_mtime_ns for folder in changed}


def write_finetuning_sweep(tmp_path: Path, **changes: Any) -> Path:
    shards = write_shards(tmp_path / "labelled")
    recipe = {
        "task": "finetune",
        "model": {"size": "vit_b", "image_size": 32},  # the rest of it is the pretraining's
        "data": {"train": str(shards), "val": str(write_shards(tmp_path / "val", seed=1)), "workers": 0},
        "finetune": {"freeze_patches": False},
        "schedule": {"warmup_steps": 1},
        "train": {"global_batch_size": 8, "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return write_sweep(
        tmp_path, finetune={"config": str(tmp_path / "recipe.yaml"), "samples": 24}, sizes={"one": {}}, **changes
    )


def test_a_finetuning_follows_each_run(tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text("objective: {shift: false}\n")
    path = write_finetuning_sweep(tmp_path, variants=[str(tmp_path / "row.yaml")])
    pretraining, finetuning = plan_runs(read_sweep(path))
    assert finetuning.after is pretraining
    assert finetuning.overrides["finetune.weights"] == str(pretraining.folder)
    done = sweep(path, "--jobs", 2, "--json", "-")
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)["runs"]
    assert (before["steps"], after["steps"]) == (4, 3)
    assert "top1" in after
    assert "top1" not in before
    recorded = yaml.safe_load((finetuning.folder / "config.yaml").read_text())
    assert recorded["objective"]["shift"] is False  # what was pretrained, for the record


def test_no_finetuning_follows_a_failed_run(tmp_path: Path) -> None:
    path = write_finetuning_sweep(tmp_path, overrides=tiny() | {"data.train": str(tmp_path / "nothing")})
    done = sweep(path, "--json", "-")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert list(found["failed"]) == ["one-32-s0"]
    assert not Path(found["runs"][1]["folder"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """Also in the background of a shell, which has its children ignore SIGINT."""
    path = write_sweep(tmp_path, samples=[800])
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen([*TOOL, str(path)], env=ENVIRONMENT, cwd=REPOSITORY, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, ignored)
    give_up = time.monotonic() + 120
    while not any((tmp_path / "runs").glob("*/checkpoints/step_*")):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command goes on from here" in said
    done = sweep(path, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert all(run["finished"] for run in json.loads(done.stdout)["runs"])
    outputs = [log.read_text() for log in (tmp_path / "runs").glob("*/output.txt")]
    assert any("resumed after step" in text for text in outputs)


def test_a_run_that_fails_is_shown(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, overrides=tiny() | {"data.train": str(tmp_path / "nothing")}, sizes={"one": {}})
    done = sweep(path)
    assert done.returncode == 1
    assert "failed: one-32-s0: error: " in done.stdout


def test_what_is_wrong_is_one_clear_line(tmp_path: Path) -> None:
    cases = [
        ({"budgets": [1e9]}, "must give one of 'budgets'"),
        ({"samples": [4]}, "is less than one step of size large, which takes 8 images"),
        ({"sizes": {"odd": {"model.widht": 32}}}, "unknown key 'model.widht'"),
        ({"finetune": {"config": "recipe.yaml"}}, "finetune must have 'config' and 'samples'"),
        ({"variants": "row.yaml"}, "variants must be a list"),
        ({"budget": [1e9]}, "unknown key 'budget'"),
    ]
    for number, (changes, why) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = sweep(write_sweep(folder, **changes), "--dry-run")
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_an_array_for_slurm(tmp_path: Path) -> None:
    assert sweep(write_sweep(tmp_path), "--slurm", tmp_path / "array.sh").returncode == 0
    script = (tmp_path / "array.sh").read_text()
    assert "--array=0-1" in script
    assert subprocess.run(["bash", "-n", str(tmp_path / "array.sh")]).returncode == 0


def test_a_grid_varies_any_key(tmp_path: Path) -> None:
    grid = {"optimizer.lr": [0.001, 0.01], "model.rope": [True, False]}
    runs = plan_runs(read_sweep(write_sweep(tmp_path, grid=grid)))
    assert len(runs) == len({run.folder for run in runs}) == 2 * 4
    varied = {(run.overrides["optimizer.lr"], run.overrides["model.rope"]) for run in runs}
    assert varied == {(lr, rope) for lr in (0.001, 0.01) for rope in (True, False)}
    assert any("rope=False-lr=0.01" in run.name for run in runs)
    done = sweep(write_sweep(tmp_path / "again", grid={"optimizer.lr": 0.001}), "--dry-run")
    assert done.returncode == 2
    assert "grid gives 'optimizer.lr' no list of values" in done.stderr


def test_a_dry_run_says_what_it_will_take(tmp_path: Path) -> None:
    done = sweep(write_sweep(tmp_path), "--dry-run", "--rate", "0.001", "--json", "-")
    assert done.returncode == 0, done.stderr
    for run in json.loads(done.stdout)["runs"]:
        assert run["predicted_hours"] == pytest.approx(run["flops"] / 1e9 / 3600)
