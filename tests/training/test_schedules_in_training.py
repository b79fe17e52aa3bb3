"""Rates, weight decay and the average's decay of a real run, read back from its checkpoints, are those of its plan."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nepa_scale.sharding import Shard
from nepa_scale.train import main
from nepa_scale.training.checkpoint import load_shards
from nepa_scale.training.checkpoint_format import read_index
from tests.launch import TINY, write_shards

STEPS = 4
# by hand: a step of warmup to 0.01 and a cosine to 0; a cosine from 0.5 to 8, a quarter of it gone at the first update
RATES = [0.0, 0.01, 0.0075, 0.0025]
WEIGHT_DECAYS = [1.5983496, 4.25, 6.9016504, 8.0]
AVERAGE_DECAYS = [0.3, 0.45, 0.6, 0.75]
KINDS = ("master", "ema", "exp_avg", "exp_avg_sq")
WORDS = [
    *TINY, f"train.steps={STEPS}", "schedule.warmup_steps=1", "optimizer.lr=1e-2", "optimizer.weight_decay=0.5",
    "optimizer.weight_decay_end=8.0", "ema.decay=0.3", "ema.decay_end=0.9", "checkpoint.every=1", "checkpoint.keep=9",
    "data.workers=0",
]  # fmt: skip


def read(run: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Everything that the checkpoint of `step` holds of each parameter, in float64."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    shards = [
        Shard(name, shape, 0, size := torch.Size(shape).numel(), {kind: torch.empty(size) for kind in KINDS})
        for name, shape in read_index(folder).shapes.items()
    ]
    load_shards(folder, shards)
    return {shard.name: {kind: tensor.double() for kind, tensor in shard.tensors.items()} for shard in shards}


def test_a_run_computes_with_what_its_schedule_says(tmp_path: Path) -> None:
    shards, run = write_shards(tmp_path / "train"), tmp_path / "run"
    assert main([*WORDS, f"data.train={shards}", f"output={run}"]) == 0
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    assert main([*WORDS, f"data.train={shards}", f"output={run}", "--dry-run", "--json", f"{tmp_path}/plan.json"]) == 0
    groups = json.loads((tmp_path / "plan.json").read_text())["groups"]
    decayed = {name for group in groups if group["weight_decay"] for name in group["parameters"]}
    before = read(run, 1)
    for step in range(1, STEPS):  # the first update has the rate 0
        after, lr, average = read(run, step + 1), RATES[step], AVERAGE_DECAYS[step]
        for name, held in after.items():
            update = (held["exp_avg"] / (1 - beta1 ** (step + 1))) / (
                (held["exp_avg_sq"] / (1 - beta2 ** (step + 1))).sqrt() + eps
            )
            decay = WEIGHT_DECAYS[step] if name in decayed else 0.0
            expected = before[name]["master"] * (1 - lr * decay) - lr * update
            torch.testing.assert_close(held["master"], expected, rtol=2e-5, atol=2e-7)
            expected = average * before[name]["ema"] + (1 - average) * held["master"]
            torch.testing.assert_close(held["ema"], expected, rtol=2e-5, atol=2e-7)
        before = after
