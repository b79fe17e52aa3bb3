"""Counts the bytes of one real step of every sharding strategy; run by torchrun, on any number of ranks.

torchrun --nproc_per_node 2 tests/profiling/communication_ranks.py OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from nepa_scale.config import ModelConfig
from nepa_scale.profiling.communication import count_step
from nepa_scale.profiling.memory_measured import build_setup
from nepa_scale.profiling.setup import Setup
from nepa_scale.sharding import join_world, leave_world
from nepa_scale.training.departure import depart

MODEL = ModelConfig(size="vit_ti", image_size=28, depth=3)
STRATEGIES, PRECISIONS = ("ddp", "fsdp", "zero1", "zero2", "zero3"), ("fp32", "bf16")


def main() -> None:
    world = join_world()
    counts = {}
    for precision in PRECISIONS:
        for name in STRATEGIES:
            strategy = build_setup(Setup(MODEL, name, world.size, 2, precision, "none", ema=False), world)
            inputs = {"images": torch.randn(2, 3, 28, 28), "rope_scale": torch.ones(())}
            count_step(strategy, inputs)  # the first one still arranges buffers
            counts[f"{name}/{precision}"] = count_step(strategy, inputs)
            strategy.close()
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(counts))
    leave_world()
    depart(0)


if __name__ == "__main__":
    main()
