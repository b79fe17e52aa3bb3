"""Runs with mae and jepa: resumed, evaluated, exported and fine-tuned as any other."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nepa_scale.config import ConfigError, load_config
from nepa_scale.interop import load_official, save_official
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding import build_strategy, join_world, leave_world
from nepa_scale.training.batching import plan_batches, step_settings
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.export import load_task
from nepa_scale.training.finetuning import Finetuning
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.teacher import make_teacher
from tests.launch import TINY, metrics, run_training, write_shards
from tests.training.test_finetuning import shards_of

OBJECTIVES = (pytest.param("mae", marks=pytest.mark.slow), "jepa")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def run_of(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each objective, made where it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    val = write_shards(folder / "val", samples=13, seed=9)

    @functools.cache
    def run(objective: str) -> Path:
        train(objective, shards, folder / objective, f"data.val={val}", "checkpoint.every=3", "checkpoint.keep=2")
        return folder / objective

    return run


def train(objective: str, shards: Path, run: Path, *more: str) -> None:
    done = run_training(
        [*TINY, f"objective.name={objective}", "model.image_size=40", f"data.train={shards}", f"output={run}", *more]
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_has_the_same_losses(
    objective: str, run_of: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    """On other micro-batches: what is hidden depends on samples alone, and the teacher comes from the checkpoint."""
    whole = metrics(run_of(objective))
    middle = run_of(objective) / "checkpoints" / "step_00000003"
    train(objective, shards, tmp_path / "run", f"train.resume={middle}", "train.micro_batch_size=4")
    for mine, expected in zip(metrics(tmp_path / "run"), whole[3:], strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert mine["flops_seen"] == expected["flops_seen"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_encoder_leaves_as_any_other(objective: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Evaluated in the run, loaded without what serves pretraining only, exported, and fine-tuned from."""
    rows = [json.loads(line) for line in (run_of(objective) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 6]
    assert ("target_cosine" in rows[1]) == (objective == "jepa")
    task = load_task(run_of(objective))
    assert isinstance(task, NextEmbedding)
    assert not task.objective.causal
    save_official(task, tmp_path / "official")
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = task(images)["predictions"]
        torch.testing.assert_close(load_official(tmp_path / "official")(images).predictions, expected)
    overrides = [word for word in TINY if word.startswith("model.")]
    tuned = Finetuning(
        load_config(None, ["task=finetune", *overrides, "model.image_size=40", f"finetune.weights={run_of(objective)}",
                           "finetune.average=false", "train.steps=1"]), 4, 2
    )  # fmt: skip
    held = shards_of(tuned.build())
    tuned.initialize(held)
    weights = {shard.name: shard.tensors["master"] for shard in held}
    for name, parameter in task.named_parameters():
        assert torch.equal(weights[name], parameter.detach().flatten()), name


def test_the_teacher_is_the_average_and_leaves_the_weights_alone() -> None:
    words = [word for word in TINY if word.startswith(("model.", "train.precision", "train.steps"))]
    config = load_config(None, [*words, "objective.name=jepa", "model.image_size=40", "ema.decay=0.5"])
    config.train.global_batch_size = 2
    world = join_world()
    try:
        task = Pretraining(config)
        settings = step_settings(config, plan_batches(config.train, 1), compiled=False)
        strategy = build_strategy("single", None, world, task.build, task.groups, settings)
        task.initialize(strategy.shards)
        average = MovingAverage(strategy.shards)
        teacher = make_teacher(config, strategy, average)
        assert teacher is not None
        with torch.no_grad():
            for shard in strategy.shards:
                shard.tensors["ema"].mul_(2.0)
        inputs = {"images": torch.rand(2, 3, 40, 40), "rope_scale": torch.ones(()), "sample_keys": torch.arange(2)}
        kept = {name: parameter.clone() for name, parameter in strategy.module.named_parameters()}
        taught = teacher.teach(inputs)["taught"]
        for name, parameter in strategy.module.named_parameters():
            assert torch.equal(parameter, kept[name]), name
        with torch.no_grad():
            for parameter in strategy.module.parameters():
                parameter.mul_(2.0)
            expected = strategy.module(inputs["images"], rope_scale=inputs["rope_scale"])["predictions"]
        assert torch.equal(taught, expected)
        assert not taught.requires_grad
        strategy.close()
    finally:
        leave_world()
    assert make_teacher(load_config(None, ["objective.name=mae"]), strategy, None) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=jepa", "ema.decay=0"], "learns from the run's moving average: set ema.decay"),
        (["objective.name=mae", "objective.causal=false"], "a key of objective.name=next_embedding"),
        (["objective.mae.depth=2"], "a key of objective.name=mae, but the run's is next_embedding"),
        (["objective.name=jepa", "objective.mae.hidden=0.5"], "a key of objective.name=mae, but the run's is jepa"),
        (["objective.name=jepa", "objective.mask_ratio=0.4"], "a key of objective.name=next_embedding"),
        (["objective.name=i_jepa"], "did you mean 'jepa'"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)
