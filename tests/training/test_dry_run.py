"""A run's plan without the run: what it says is what training does, and nothing is left behind."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nepa_scale.config import config_from_dict, load_config
from nepa_scale.interop.official import official_names
from nepa_scale.objectives import Classifier
from nepa_scale.train import main
from nepa_scale.training.finetuning import Finetuning
from nepa_scale.training.schedule import learning_rate
from tests.launch import REPOSITORY, TINY, write_shards

ORACLE = REPOSITORY.parent / "shared" / "oracles" / "nepa_finetune_rates_b.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


def plan_of(arguments: list[str], tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert main([*arguments, "--dry-run", "--json", str(file)]) == 0
    plan: dict[str, Any] = json.loads(file.read_text())
    return plan


def rate(plan: dict[str, Any], group: dict[str, Any], step: int) -> float:
    """As the plan's reader computes it."""
    return learning_rate(
        step,
        peak=group["peak_lr"],
        warmup=group["warmup_steps"],
        total=plan["schedule"]["total_steps"],
        final_fraction=plan["schedule"]["final_lr_fraction"],
    )


def test_the_plan_of_a_pretraining(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, f"data.train={shards}", f"output={tmp_path}/run", "train.micro_batch_size=2",
             "optimizer.weight_decay_end=0.2"]  # fmt: skip
    plan = plan_of(words, tmp_path)
    printed = capsys.readouterr().out
    assert "40 images, 5 steps an epoch; batch 8 = 1 ranks x 2 x 4" in printed
    assert "0.05 -> 0.2" in printed
    config = load_config(REPOSITORY / "configs/pretrain/demo.yaml", words)
    assert config_from_dict(plan["config"], "plan") == config
    assert plan["batches"] == {
        "global_batch_size": 8, "micro_batch_size": 2, "accumulation": 4, "world_size": 1, "samples": 40,
        "steps_per_epoch": 5,
    }  # fmt: skip
    assert plan["schedule"] == {"total_steps": 6, "warmup_steps": 2, "peak_lr": 1e-3, "final_lr_fraction": 0.0}
    decayed, others = plan["groups"]
    assert (decayed["weight_decay"], decayed["weight_decay_end"], others["weight_decay"]) == (0.05, 0.2, 0.0)
    assert {group["warmup_steps"] for group in plan["groups"]} == {2}
    assert "backbone.embedding.weight" in decayed["parameters"]
    assert "backbone.norm.weight" in others["parameters"]
    assert plan["costs"]["total_flops"] == plan["costs"]["train_flops_per_image"] * 48
    assert not (tmp_path / "run").exists()


def test_json_on_stdout_is_all_there_is(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"data.train={shards}", f"output={tmp_path}/run", "--dry-run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schedule"]["total_steps"] == 6
    assert not (tmp_path / "run").exists()


def test_what_a_run_would_refuse_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contradicting, broken = tmp_path / "zero.json", tmp_path / "broken"
    broken.mkdir()
    with tarfile.open(broken / "shard-000000.tar", "w") as tar:
        for sample in range(40):
            entry = tarfile.TarInfo(f"{sample:05d}.jpg")
            entry.size = 5
            tar.addfile(entry, io.BytesIO(b"noise"))
    contradicting.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 999}))
    for words, message in [
        ([f"data.train={tmp_path}/none"], "error: "),
        ([f"data.train={shards}", "train.micro_batch_size=3"], "error: train.micro_batch_size=3 does not divide"),
        ([f"data.train={shards}", "train.global_batch_size=64"], "less than one batch"),
        ([f"data.train={shards}", "--ds_config", str(contradicting)], "train_batch_size=999"),
        ([f"data.train={shards}", "task=finetune", "augment.rand_augment=rand-x9"], "augment.rand_augment=rand-x9"),
        ([f"data.train={broken}"], f"data.train={broken}: "),
    ]:
        assert main([*TINY, *words, f"output={tmp_path}/run", "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert main([*TINY, "--json", "-"]) == 2
    assert "--json is for the plan of --dry-run" in capsys.readouterr().err


def test_the_resolved_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.steps=7", "model.qk_norm=true", "ema.decay=0.5"]
    assert main(["--config", "configs/pretrain/vit_b14.yaml", "train.epochs=null", *words, "--print-config"]) == 0
    printed = config_from_dict(yaml.safe_load(capsys.readouterr().out), "printed")
    assert printed == load_config("configs/pretrain/vit_b14.yaml", ["train.epochs=null", *words])


@pytest.mark.skipif(not ORACLE.is_file(), reason="the oracle is not part of the repository")
def test_the_plan_of_a_fine_tuning_is_the_official_one(shards: Path, tmp_path: Path) -> None:
    expected = json.loads(ORACLE.read_text())
    file = "configs/finetune/vit_b14_in1k.yaml"
    words = ["train.epochs=null", "train.steps=500", "schedule.warmup_steps=100", "data.val=null",
             "finetune.weights=null", "train.global_batch_size=8", "train.micro_batch_size=8",
             "optimizer.lr=6e-3"]  # fmt: skip
    plan = plan_of(["--config", file, *words, f"data.train={shards}", f"output={tmp_path}/run"], tmp_path)
    module = Finetuning(load_config(file, words), 4, 8).build()
    assert isinstance(module, Classifier)
    theirs = dict(official_names(module))
    seen = set()
    for group in plan["groups"]:
        for name in (official for ours in group["parameters"] for official in theirs[ours]):
            seen.add(name)
            if group["label"] == "frozen":
                assert name in expected["frozen"]
                assert group["peak_lr"] == 0.0
                continue
            assert group["weight_decay"] == expected["parameters"][name]["weight_decay"]
            for step, official in expected["parameters"][name]["lr"].items():
                assert rate(plan, group, int(step)) == pytest.approx(official, rel=1e-12, abs=1e-20), name
    assert seen == {*expected["parameters"], *expected["frozen"]}


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_each_group_has_its_warmup(decay: float, shards: Path, tmp_path: Path) -> None:
    words = [*TINY, "task=finetune", f"data.train={shards}", f"output={tmp_path}/run", "schedule.warmup_steps=4",
             f"finetune.layer_decay={decay}"]  # fmt: skip
    plan = plan_of(words, tmp_path)
    warmups = [group["warmup_steps"] for group in plan["groups"]]
    assert warmups == ([1, 4, 3, 3, 1, 1, 1, 1, 1] if decay < 1 else [4] * 9)
