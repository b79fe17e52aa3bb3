"""The throughput of real steps: the parts add up, and nothing is invented."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nepa_scale.profiling import count_flops
from nepa_scale.profiling.throughput import PHASES, measured_product_rate
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


def test_a_product_is_timed() -> None:
    assert measured_product_rate(torch.device("cpu"), "fp32", width=256) > 1e8
