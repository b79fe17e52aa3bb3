"""The throughput of real steps: the parts add up, and nothing is invented."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nepa_scale.config import load_config
from nepa_scale.models import resolve_architecture
from nepa_scale.profiling import count_flops
from nepa_scale.profiling import throughput as throughput_module
from nepa_scale.profiling.throughput import PHASES, Spread, measured_product_rate
from nepa_scale.sharding import World
from nepa_scale.training.batching import BatchPlan
from tests.launch import REPOSITORY, write_shards

TINY = [
    "model.width=48", "model.depth=2", "model.heads=3", "model.patch_size=8", "model.image_size=32",
    "train.precision=fp32", "train.global_batch_size=8", "train.steps=1", "data.workers=1",
    "train.micro_batch_size=null",
]  # fmt: skip


def throughput(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    tool = str(REPOSITORY / "tools" / "throughput.py")
    return subprocess.run(
        [sys.executable, *launcher, tool, "--config", "configs/pretrain/vit_b14.yaml", *TINY, *arguments],
        env=environment, capture_output=True, text=True, timeout=200, cwd=REPOSITORY,
    )  # fmt: skip


def test_a_step_and_its_phases(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "steps.png"
    options = ["--steps", "4", "--warmup", "1", "--measured-peak", "--trace", str(trace), "--plot", str(picture)]
    done = throughput("data.train=null", *options, "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    low, high = facts["images_per_second_spread"]
    assert 0 < low <= facts["images_per_second"] <= high
    assert facts["images_per_second"] == pytest.approx(8 / facts["step_seconds"], rel=0.3)
    assert facts["tokens_per_second"] == pytest.approx(17 * facts["images_per_second"])
    assert facts["split"].keys() == set(PHASES)
    assert all(facts["split"][phase] > 0 for phase in ("forward", "backward", "optimizer"))
    flops = count_flops(width=48, depth=2, heads=3, patch_size=8, image_size=32)
    expected = facts["images_per_second"] * flops.train_flops_per_image / facts["peak_flops"]
    assert facts["mfu"] == pytest.approx(expected)
    assert facts["peak_source"] == "measured product"
    assert "traceEvents" in json.loads(trace.read_text())
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_two_ranks_wait_for_each_other_and_compare(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    compare = ["--compare", "activation_checkpointing=none,full", "--steps", "3", "--warmup", "1"]
    done = throughput(f"data.train={shards}", "strategy=fsdp", *compare, "--json", "-", ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["compared"]
    assert [one["variant"] for one in found] == ["activation_checkpointing=none", "activation_checkpointing=full"]
    for one in found:
        assert one["world_size"] == 2
        assert one["split"]["communication"] > 0
        assert one["split"]["data"] > 0
        if not torch.cuda.is_available():
            assert one["mfu"] is one["peak_source"] is None


def test_mistakes_are_one_line() -> None:
    for options, message in ((["--compare", "compile"], "key=value,value"), (["model.sise=1"], "did you mean")):
        done = throughput("data.train=null", *options)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_a_products_rate_is_that_of_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only while products are computed: 0.5 s, 0.25 s, then 1 s each."""
    durations = iter([0.5, 0.25, *[1.0] * 20])
    now = [100.0]
    product = torch.Tensor.__matmul__

    def timed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        now[0] += next(durations)
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: now[0])
    assert measured_product_rate(torch.device("cpu"), "fp32", width=64) == pytest.approx(2 * 64**3 / 0.25)


def test_rates_follow_from_the_seconds_of_the_steps() -> None:
    """Steps of 1, 2 and 4 seconds of a batch of 8, on two devices of 1 TFLOP/s."""
    config = load_config(None, [word for word in TINY if "micro" not in word])
    architecture, two = resolve_architecture(config.model), World(0, 2, 0, torch.device("cpu"))
    runner = SimpleNamespace(
        task=SimpleNamespace(architecture=architecture), strategy=SimpleNamespace(name="fsdp"), plan=BatchPlan(8, 2, 2)
    )
    found = throughput_module._summary(config, runner, two, [1.0, 4.0, 2.0], {}, 7, 1e12, "data sheet")  # type: ignore[arg-type]
    flops = count_flops(width=48, depth=2, heads=3, patch_size=8, image_size=32).train_flops_per_image
    assert found.images_per_second == Spread(2.0, 4.0, 8.0)
    assert found.step_seconds == Spread(1.0, 2.0, 4.0)
    assert found.tokens_per_second == 4.0 * 17
    assert found.mfu == pytest.approx(4.0 * flops / 2e12)
    assert (found.world_size, found.micro_batch, found.accumulation, found.steps) == (2, 2, 2, 3)
