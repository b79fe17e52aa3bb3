"""The memory of the real training step, measured on every rank; launches its own ranks.

On the host the bytes of live tensors are counted (`LiveTensors`), so that neither an allocator nor what else a process
holds blurs them. On a GPU it is `max_memory_allocated`, the peak of the allocator, with live tensors' kinds beside it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo  # before zero.Init replaces tensors' constructors, which its import does not survive

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.profiling.live_tensors import OTHER, LiveTensors
from nepa_scale.profiling.setup import Setup
from nepa_scale.sharding import StepSettings, Strategy, World, build_strategy, choose_strategy, join_world, leave_world
from nepa_scale.sharding.ds_config import DS_CONFIGS
from nepa_scale.training.departure import depart
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.optimization import pretraining_groups


def measure(setups: Sequence[Setup], timeout: float = 1200.0) -> list[dict[str, int]]:
    """Bytes by kind, and `total`, at the peak of the fullest rank's second step, of each setup.

    Setups that share a world size share a launch.
    Raises:
        ConfigError: ranks that fail; their last line is the message.
    """
    found: dict[int, dict[str, int]] = {}
    for world_size in sorted({setup.world_size for setup in setups}):
        chosen = [index for index, setup in enumerate(setups) if setup.world_size == world_size]
        for index, result in zip(chosen, _launch([setups[i] for i in chosen], world_size, timeout), strict=True):
            found[index] = result
    return [found[index] for index in range(len(setups))]


def _launch(setups: list[Setup], world_size: int, timeout: float) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory(prefix="memory_") as folder:
        task = Path(folder) / "setups.json"
        task.write_text(json.dumps([dataclasses.asdict(setup) for setup in setups]))
        launcher = [] if world_size == 1 else [
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        if not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "nepa_scale.profiling.memory_measured", str(task), folder],
            env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
            raise ConfigError(f"the measured step failed: {lines[0].strip()}")
        ranks = [json.loads((Path(folder) / f"rank_{rank}.json").read_text()) for rank in range(world_size)]
    return [max(of_ranks, key=lambda kinds: kinds["total"]) for of_ranks in zip(*ranks, strict=True)]


def _work(task: Path, folder: Path) -> None:
    """Measures all setups of a file on this rank."""
    world = join_world()
    setups = [Setup(**fields | {"model": ModelConfig(**fields["model"])}) for fields in json.loads(task.read_text())]
    results = [measure_here(setup, world) for setup in setups]
    (folder / f"rank_{world.rank}.json").write_text(json.dumps(results))
    leave_world()


def measure_here(setup: Setup, world: World) -> dict[str, int]:
    """This rank's bytes by kind at the peak of its second step: the first one still arranges buffers. Collective."""
    with LiveTensors() as live:
        strategy = build_setup(setup, world)
        _claim_state(live, strategy)
        images = torch.zeros(setup.micro_batch, 3, *resolve_architecture(setup.model).image_size, device=world.device)
        live.claim([images], "inputs")
        inputs = {"images": images, "rope_scale": torch.ones((), device=world.device)}
        for _ in range(2):
            live.restart()
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(world.device)
            with live.saving("activations"):
                strategy.forward_backward(inputs, micro_step=0)
            live.claim((p.grad for p in strategy.module.parameters() if p.grad is not None), "gradients")
            strategy.step(1e-4)  # the moving average is updated in place: that it is there is all it takes
        kinds = {kind: size for kind, size in live.peak.items() if size}
        kinds["total"] = live.peak_total
    if world.device.type == "cuda":
        # what the allocator held at its peak; what no live tensor explains are the kernels' own buffers
        kinds[OTHER] = kinds.get(OTHER, 0) + torch.cuda.max_memory_allocated(world.device) - kinds["total"]
        kinds["total"] = torch.cuda.max_memory_allocated(world.device)
    strategy.close()
    return kinds


def build_setup(setup: Setup, world: World) -> Strategy:
    """The strategy of a setup, with weights and, where it has one, a moving average. Collective."""
    architecture = resolve_architecture(setup.model)
    ds_config = DS_CONFIGS / "zero3_offload.json" if setup.offload else None
    name, values = choose_strategy(setup.strategy, ds_config, world.size)
    settings = StepSettings(
        setup.precision, setup.micro_batch, 1, 1.0, (0.9, 0.95), 1e-8, setup.recompute, compile=False
    )
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    strategy = build_strategy(
        name,
        values,
        world,
        lambda: NextEmbedding(CausalViT(architecture, dtype), ObjectiveConfig()),
        lambda names: pretraining_groups(names, 0.05),
        settings,
    )
    for shard in strategy.shards:
        shard.tensors["master"].normal_(std=0.02)
    strategy.refresh()
    if setup.ema:
        MovingAverage(strategy.shards)  # the shards hold it
    return strategy


def _claim_state(live: LiveTensors, strategy: Strategy) -> None:
    held = [getattr(p, "ds_tensor", p) for p in strategy.module.parameters()]
    live.claim((tensor.data for tensor in held), "parameters")
    for kind, ours in (("master", "masters"), ("exp_avg", "moments"), ("exp_avg_sq", "moments"), ("ema", "ema")):
        live.claim((shard.tensors[kind] for shard in strategy.shards if kind in shard.tensors), ours)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
    depart(0)
