"""The fullest moment of rank 0 among many ranks that do not exist: torch's fake process group moves nothing.

Started as a program, `fake_world.py STRATEGY WORLD_SIZE RECOMPUTE`; prints predicted and measured bytes as JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nepa_scale.config import ModelConfig
from nepa_scale.profiling.memory import predict
from nepa_scale.profiling.memory_measured import measure_here
from nepa_scale.profiling.setup import Setup
from nepa_scale.sharding import World


def main() -> None:
    strategy, size, recompute = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # DeepSpeed reads them, though nobody is called
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    setup = Setup(ModelConfig(size="vit_ti", image_size=56, depth=4), strategy, size, 8, "bf16", recompute)
    measured = measure_here(setup, World(0, size, 0, torch.device("cpu")))
    print(json.dumps({"predicted": predict(setup).components, "measured": measured}))


if __name__ == "__main__":
    main()
