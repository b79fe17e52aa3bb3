"""Which weights a number is of: one rule, from the loop to the tools."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nepa_scale import train
from nepa_scale.config import ConfigError, ModelConfig, load_config, to_dict
from nepa_scale.evaluation.loading import load_any
from nepa_scale.evaluation.online import FeatureEvaluation
from nepa_scale.interop import save_official
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier
from nepa_scale.sharding import Shard, Strategy
from nepa_scale.training.checkpoint import Checkpointer, read_meta
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.export import load_task
from nepa_scale.training.pretrained import load_backbone
from nepa_scale.training.run_folder import read_json_lines
from nepa_scale.training.weights import MOST_INITIAL, SHARE, choose_weights, default_weights, weights_of
from tests.launch import REPOSITORY, TINY, write_shards
from tests.training.checkpoint_ranks import whole_state

YES, NO = torch.tensor(True), torch.tensor(False)


def test_an_average_is_old_enough_with_a_twentieth_of_the_initial_weights() -> None:
    assert MOST_INITIAL == 0.05
    assert default_weights(0.05) == "ema"
    assert default_weights(0.0501) == "raw"
    assert default_weights(None) == "raw"


def test_the_share_of_the_initial_weights_is_the_one_in_the_average() -> None:
    """Zeros follow a one: what is left of it is the share."""
    shard = Shard("a", (1,), 0, 1, {"master": torch.ones(1)})
    average = MovingAverage([shard])
    shard.tensors["master"].zero_()
    for decay, refused in ((0.9, NO), (0.5, YES), (0.99, NO), (0.7, NO)):
        average.update(refused, decay)
    assert average.initial_share() == pytest.approx(0.9 * 0.99 * 0.7, rel=1e-12)
    assert average.initial_share() == pytest.approx(shard.tensors["ema"].item(), rel=1e-5)
    average.set_initial_share(0.25)
    average.update(NO, 0.5)
    assert average.initial_share() == 0.125
    average.restart()
    assert average.initial_share() == 1.0


def test_the_share_stays_exact_over_a_long_run() -> None:
    average = MovingAverage([])
    for _ in range(3000):
        average.update(NO, 0.999)
    assert average.initial_share() == pytest.approx(0.999**3000, rel=1e-9)
    assert default_weights(average.initial_share()) == "ema"


def save(folder: Path, state: list[Shard] | None = None, *overrides: str, **meta: Any) -> Path:
    """A checkpoint of step 20 with this in its meta."""
    checkpointer = Checkpointer(folder, keep=1, rank=0, world_size=1)
    config = to_dict(load_config(None, list(overrides)))
    checkpointer.save(20, state or whole_state(1), replicated=True, meta={"step": 20, "config": config} | meta)
    checkpointer.close()
    return folder / "checkpoints" / "step_00000020"


@pytest.mark.parametrize(
    ("overrides", "meta", "weights", "percent"),
    [
        ([], {SHARE: 0.04}, "ema", ""),
        ([], {SHARE: 0.789}, "raw", "79%"),
        # checkpoints that do not say: at a constant decay, by the updates that were applied
        (["ema.decay=0.8"], {"optimizer_steps": 14}, "ema", ""),
        (["ema.decay=0.8"], {"optimizer_steps": 13}, "raw", "5%"),
        (["ema.decay=0.8"], {}, "ema", ""),
    ],
)
def test_a_checkpoint_has_a_default(
    overrides: list[str], meta: dict[str, Any], weights: str, percent: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, None, *overrides, **meta)
    chosen = choose_weights(folder, None)
    assert (chosen.weights, chosen.step) == (weights, 20)
    assert chosen.kind == {"raw": "master", "ema": "ema"}[weights]
    expected = f"the moving average is {percent} initial weights after 20 steps: raw weights are taken; --weights ema"
    assert chosen.note.startswith(expected) if percent else chosen.note == ""
    for asked in ("raw", "ema"):
        assert (choose_weights(folder, asked).weights, choose_weights(folder, asked).note) == (asked, "")


def test_there_is_not_always_an_average(tmp_path: Path) -> None:
    folder = save(tmp_path, whole_state(1, kinds=("master", "exp_avg", "exp_avg_sq")), "ema.decay=0")
    assert choose_weights(folder, None).weights == choose_weights(folder, "raw").weights == "raw"
    with pytest.raises(ConfigError, match="holds no moving average"):
        choose_weights(folder, "ema")


def test_rows_of_earlier_versions_name_no_weights() -> None:
    pretraining, finetuning = (load_config(None, [f"task={task}"]) for task in ("pretrain", "finetune"))
    assert weights_of({"knn_top1": 0.5}, pretraining) == weights_of({"knn_top1": 0.5}, None) == "raw"
    assert weights_of({"top1": 0.5}, finetuning) == "ema"
    assert weights_of({"top1": 0.5, "weights": "raw"}, finetuning) == "raw"


def test_an_official_folder_has_no_average_to_ask_for(tmp_path: Path) -> None:
    save_official(Classifier(build_vit("vit_b", 8, 32, seed=4, **SMALL), 5), tmp_path)
    assert load_any(tmp_path, None).facts == {"checkpoint": str(tmp_path), "weights": "official", "step": None}
    with pytest.raises(ConfigError, match=r"pytorch_model_ema\.bin is missing: this folder has no moving average"):
        load_any(tmp_path, "ema")


SMALL = {"width": 48, "depth": 2, "heads": 3, "layer_scale": 0.1}


@pytest.mark.parametrize(
    ("share", "average", "kind"),
    [(0.04, None, "ema"), (0.06, None, "master"), (0.04, False, "master"), (0.06, True, "ema")],
)
def test_fine_tuning_starts_by_the_same_rule(share: float, average: bool | None, kind: str, tmp_path: Path) -> None:
    task = Classifier(build_vit("vit_b", 8, 32, seed=4, **SMALL), 5)
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters() if name.startswith("backbone.")}
    state = whole_state(3, shapes, ("master", "ema"))
    model = ModelConfig(patch_size=8, image_size=32, **SMALL)
    keys = [f"model.{key}={value}" for key, value in (SMALL | {"patch_size": 8, "image_size": 32}).items()]
    save(tmp_path, state, *keys, **{SHARE: share})
    read = [
        Shard(name, tuple(p.shape), 0, p.numel(), {"master": p.detach().view(-1)})
        for name, p in task.named_parameters()
    ]
    origin = load_backbone(str(tmp_path), read, model, average=average)
    saved = {shard.name: shard.tensors[kind] for shard in state}
    assert all(torch.equal(s.tensors["master"], saved[s.name]) for s in read if s.name in saved)
    assert f"({'ema' if kind == 'ema' else 'raw'} weights of step 20)" in origin
    assert ("6% initial weights" in origin) == (share > MOST_INITIAL and average is None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """Evaluated at steps 0, 3 and 6; with the weights that were. A decay of 0.5 leaves 0.125 at 3, and 0.016 at 6."""
    folder = tmp_path_factory.mktemp("trained")
    shards, run = write_shards(folder / "shards"), folder / "run"
    val = write_shards(folder / "val", samples=13, seed=9)
    evaluated: list[dict[str, torch.Tensor]] = []
    original = FeatureEvaluation.of_strategy

    def watched(self: FeatureEvaluation, strategy: Strategy) -> dict[str, float]:
        module: nn.Module = strategy.module
        evaluated.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return original(self, strategy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureEvaluation, "of_strategy", watched)
        arguments = [
            *TINY, f"data.train={shards}", f"data.val={val}", f"output={run}", "ema.decay=0.5", "evaluate.every=3",
            "checkpoint.every=3", "model.layer_scale=1.0", "optimizer.lr=1e-2",
        ]  # fmt: skip
        assert train.main(arguments) == 0
    return run, evaluated


def test_a_run_evaluates_its_default_weights_and_names_them(
    run: tuple[Path, list[dict[str, torch.Tensor]]],
) -> None:
    folder, evaluated = run
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if "knn_top1" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert [row["weights"] for row in rows] == ["raw", "raw", "ema"]
    assert [row[SHARE] for row in rows] == [1.0, 0.125, 0.5**6]
    for row, weights in zip(rows[1:], evaluated[1:], strict=True):
        checkpoint = folder / "checkpoints" / f"step_{row['step']:08d}"
        assert read_meta(checkpoint)[SHARE] == row[SHARE]
        for name, value in load_task(checkpoint, row["weights"]).named_parameters():
            assert torch.equal(value, weights[name]), name
        other = dict(load_task(checkpoint, "raw" if row["weights"] == "ema" else "ema").named_parameters())
        assert any(not torch.equal(value, other[name]) for name, value in weights.items())
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best["weights"] == next(row["weights"] for row in rows if row["step"] == best["step"])


def test_a_resumed_average_is_as_old_as_it_was(run: tuple[Path, list[dict[str, torch.Tensor]]], tmp_path: Path) -> None:
    folder, resumed = run[0], tmp_path / "resumed"
    start = folder / "checkpoints" / "step_00000003"
    arguments = [
        *TINY, f"data.train={folder.parent / 'shards'}", f"output={resumed}", f"train.resume={start}", "ema.decay=0.4",
        "train.steps=5", "model.layer_scale=1.0",
    ]  # fmt: skip
    assert train.main(arguments) == 0
    share = read_meta(resumed / "checkpoints" / "step_00000005")[SHARE]
    assert share == pytest.approx(0.5**3 * 0.4**2, rel=1e-12)


Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs a tool in this process: its status, output and errors."""

    def start(tool: str, *arguments: object) -> tuple[int, str, str]:
        path = str(REPOSITORY / "tools" / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        status = runpy.run_path(path)["main"]()
        return status, *capsys.readouterr()

    return start


def test_tools_take_the_default_weights_and_name_them(
    run: tuple[Path, list[dict[str, torch.Tensor]]], program: Program, tmp_path: Path
) -> None:
    folder = run[0]
    val = folder.parent / "val"
    measured = {row["step"]: row["knn_top1"] for row in read_json_lines(folder / "metrics.jsonl") if "knn_top1" in row}
    for step, weights in ((3, "raw"), (6, "ema")):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        note = "the moving average is 12% initial weights after 3 steps: raw weights are taken" if step == 3 else ""
        output = tmp_path / f"{step}.safetensors"
        status, out, err = program("export", checkpoint, output, "--to", "safetensors", "--json", "-")
        assert (status, json.loads(out)["weights"], json.loads(out)["step"]) == (0, weights, step)
        assert note in err
        with safe_open(output, "pt") as file:
            assert file.metadata()["weights"] == weights
        status, out, err = program(
            "evaluate", checkpoint, "--data", val, "--no-probe", "--workers", 0, "--json", tmp_path / "found.json"
        )
        assert status == 0
        assert f"step {step} ({weights} weights)" in out
        assert note in err
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["weights"], found["step"]) == (weights, step)
        assert found["knn_top1"] == measured[step]
    arguments = ("attention", folder, val, "--limit", 2, "--pictures", 0, "--output", tmp_path / "gallery")
    status, out, _ = program("visualize", *arguments, "--json", tmp_path / "found.json")
    assert status == 0
    assert "step 6 (ema weights), causal" in out
    assert json.loads((tmp_path / "found.json").read_text())["weights"] == "ema"
    status, out, _ = program("export", folder, tmp_path / "raw.safetensors", "--to", "safetensors", "--weights", "raw")
    assert status == 0
    assert "(raw) of step 6" in out
