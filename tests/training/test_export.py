"""What is exported is what was trained, bit for bit, and costs little memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from nepa_scale.config import Config, ConfigError, load_config, to_dict
from nepa_scale.evaluation.loading import load_any, source_of
from nepa_scale.evaluation.model_card import write_model_card
from nepa_scale.interop import load_official
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding.shard import Shard
from nepa_scale.training.checkpoint import Checkpointer
from nepa_scale.training.export import export_safetensors, load_task
from nepa_scale.training.run_folder import prepare_run_folder
from nepa_scale.training.run_record import append_start, changes_between
from tests.training.checkpoint_ranks import cut, run_ranks, whole_state

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "model.width=48", "model.depth=2", "model.heads=3", "model.patch_size=8", "model.image_size=32",
]  # fmt: skip
META = {"step": 7, "samples_seen": 56, "dataset_samples": 40}


def config_of_test() -> Config:
    return load_config(None, OVERRIDES)


def state_of_test() -> list[Shard]:
    model = NextEmbedding(CausalViT(resolve_architecture(config_of_test().model)), config_of_test().objective)
    return whole_state(5, {name: tuple(p.shape) for name, p in model.named_parameters()})


def save(rank: int, world_size: int, run: str) -> None:
    checkpointer = Checkpointer(Path(run), keep=1, rank=rank, world_size=world_size)
    shards = cut(state_of_test(), rank, world_size, 9)
    checkpointer.save(7, shards, replicated=False, meta=META | {"config": to_dict(config_of_test())})
    checkpointer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by four ranks."""
    folder = tmp_path_factory.mktemp("run")
    assert run_ranks(4, save, str(folder)) == [0] * 4
    return folder


def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("weights", "kind"), [("raw", "master"), ("ema", "ema")])
def test_safetensors_hold_every_parameter_by_name(weights: str, kind: str, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "model.safetensors"
    done = export(run, "--to", "safetensors", output, "--weights", weights, "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    tensors = load_file(output)
    state = state_of_test()
    assert list(tensors) == sorted(shard.name for shard in state)
    for shard in state:
        assert torch.equal(tensors[shard.name], shard.tensors[kind].view(shard.shape))
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "weights": weights, "step": "7", "run": str(run)}
    assert facts["parameters"] == sum(shard.stop for shard in state)
    assert facts["bytes"] == output.stat().st_size
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("layout", ["official", pytest.param("timm", marks=pytest.mark.slow)])
def test_a_model_card_says_what_the_weights_are(layout: str, run: Path, tmp_path: Path) -> None:
    rows = [
        {"step": 0, "weights": "raw", "knn_top1": 0.25, "knn_top1_pixels": 0.125},
        {"step": 7, "weights": "raw", "knn_top1": 0.5},
        {"step": 9, "weights": "ema", "knn_top1": 0.75},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        done = export(run, "--to", layout, tmp_path / "weights", "--weights", "ema")
    finally:
        (run / "metrics.jsonl").unlink()
    assert done.returncode == 0, done.stderr
    _, front, card = (tmp_path / "weights" / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["pipeline_tag"] == "image-feature-extraction"
    assert facts.get("library_name") == ("timm" if layout == "timm" else None)
    assert "| 56 (1.4 epochs), 7 steps of 4,096 |" in card
    assert "20 neighbours | 50.0% (step 7, raw weights) |" in card  # of this checkpoint, not what the run reached later
    assert "raw pixels | 12.5% (step 0) |" in card
    assert "| weights | ema: moving average, decay 0.9999 |" in card
    assert "The ema weights, which these are, have not been evaluated in training." in card
    assert f"{sum(shard.stop for shard in state_of_test()):,}" in card
    saved = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert saved == to_dict(config_of_test())
    code = card.split("```python\n")[1].split("```")[0]
    shown = subprocess.run(
        [sys.executable, "-c", code + "\nprint(sum(p.numel() for p in model.parameters()))"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert int(shown.stdout) == sum(shard.stop for shard in state_of_test()), shown.stderr


def test_a_model_card_tells_of_changed_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (load_config(None, [*OVERRIDES, "train.steps=7", f"optimizer.lr={rate}"]) for rate in (1e-3, 2e-3))
    prepare_run_folder(tmp_path / "run", first)
    for config, step, after in ((first, 0, None), (second, 4, 1), (first, 6, 2)):
        monkeypatch.setattr(sys, "argv", ["train.py", f"optimizer.lr={config.optimizer.lr}"])
        append_start(
            tmp_path / "run", config, strategy="ddp", step=step, after=after, checkpoint=None,
            changed=changes_between(first, config, step=step),
        )  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 9}\n')
    meta = META | {"step": 6, "start": 2, "config": to_dict(second)}  # the third start came later
    checkpointer = Checkpointer(tmp_path / "run", keep=1, rank=0, world_size=1)
    checkpointer.save(6, state_of_test(), replicated=True, meta=meta)
    checkpointer.close()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000006"
    task = load_task(checkpoint, "raw")
    write_model_card(tmp_path, checkpoint, task, layout="official", weights="raw")
    card = (tmp_path / "README.md").read_text()
    assert "| steps 1 to 4 | `train.py optimizer.lr=0.001`, on 1 ranks (ddp) |" in card
    assert "| steps 5 to 6 | `train.py optimizer.lr=0.002`, on 1 ranks (ddp) |" in card
    assert "settings changed at step 4: optimizer.lr 0.001 -> 0.002" in card
    assert card.count("train.py") == 2
    changed = "settings changed at step 4: optimizer.lr 0.001 -> 0.002"
    assert load_any(checkpoint, "raw").facts["settings_changed"] == changed
    assert source_of(load_any(checkpoint, "raw").facts) == f"{checkpoint}, step 6 (raw weights; its {changed})"
    (checkpoint.parent.parent / "config.yaml").unlink()  # a checkpoint on its own has no more to tell
    write_model_card(tmp_path, checkpoint, task, layout="official", weights="raw")
    assert "train.py" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("weights", "kind"), [("raw", "master"), ("ema", "ema")])
def test_official_weights_compute_the_same(weights: str, kind: str, run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000007"
    done = export(checkpoint, "--to", "official", tmp_path / "official", "--weights", weights)
    assert done.returncode == 0, done.stderr
    assert f"({weights}) of step 7" in done.stdout
    exported, loaded = load_official(tmp_path / "official"), load_task(run, weights)
    for shard in state_of_test():
        parameter = dict(loaded.named_parameters())[shard.name]
        assert torch.equal(parameter.detach().flatten(), shard.tensors[kind])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(exported(images).predictions, loaded(images)["predictions"])


def save_one(folder: Path, state: list[Shard], config: dict[str, Any]) -> Path:
    checkpointer = Checkpointer(folder, keep=1, rank=0, world_size=1)
    checkpointer.save(1, state, replicated=True, meta={"step": 1, "config": config})
    checkpointer.close()
    return folder / "checkpoints" / "step_00000001"


def test_what_cannot_be_exported_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    done = export(tmp_path, "--to", "official", tmp_path / "official")
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path} holds no checkpoint: give a step_N folder, or a run folder that has some\n"
    )
    with pytest.raises(ConfigError, match="is a folder: give the name of a file"):
        export_safetensors(run, tmp_path)
    plain = save_one(tmp_path / "plain", whole_state(1, {"a": (3,)}, ("master",)), {"task": "finetune"})
    with pytest.raises(ConfigError, match=r"holds no moving average .*: give --weights raw"):
        export_safetensors(plain, tmp_path / "x.safetensors", "ema")


def test_damage_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = save_one(tmp_path / "run", whole_state(1, {"a": (3000,)}), {})
    path = checkpoint / "part_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be exported: .*part_00000\.safetensors is damaged"):
        export_safetensors(checkpoint, tmp_path / "out" / "x.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
from nepa_scale.training.export import export_safetensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_safetensors(sys.argv[1], Path(sys.argv[2]), "ema")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    shapes = {f"p{i}": (1024, 1024) for i in range(40)}
    checkpoint = save_one(tmp_path / "run", whole_state(1, shapes, ("master", "ema")), {})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "x.safetensors")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    model = 4 * sum(math.prod(shape) for shape in shapes.values())
    assert int(done.stdout) * 1024 < 0.25 * model
