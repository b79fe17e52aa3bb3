"""The command lines: their JSON, their pictures, and one line for what the user has to mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_flops() -> None:
    facts = json.loads(call("flops", "--size", "vit_ti", "--patch-size", "16", "--json", "-").stdout)
    assert {"size", "parameters", "flops_per_image", "train_flops_per_image", "by_module"} <= facts.keys()
    assert facts["counters"].keys() == {"closed_form", "torch", "fvcore", "deepspeed"}
    assert set(facts["counters"].values()) == {facts["flops_per_image"]}
    assert sum(facts["by_module"].values()) == facts["flops_per_image"]


def test_memory(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    done = call(
        "memory", "--size", "vit_g", "--strategy", "all", "--world-size", "8", "--json", "-", "--plot", str(picture)
    )
    found = json.loads(done.stdout)["strategies"]
    assert [one["strategy"] for one in found] == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    for one in found:
        parts = {k: v for k, v in one["predicted"].items() if isinstance(v, int) and k not in ("total", "host")}
        assert sum(parts.values()) == one["predicted"]["total"]
        assert one["measured"] is None
    assert picture.stat().st_size > 10_000


def test_plan(tmp_path: Path) -> None:
    script = tmp_path / "run.sbatch"
    done = call("plan", "--gpus", "16", "--size", "vit_l", "--json", "-", "--slurm", str(script))
    facts = json.loads(done.stdout)
    assert done.returncode == 0
    assert facts["recommended"]["fits"]
    assert (facts["config"], facts["epochs"], facts["global_batch"]) == ("configs/pretrain/vit_l14.yaml", 1600, 4096)
    assert facts["changes"]["strategy"] == ["auto", facts["recommended"]["strategy"]]
    assert all(f"{key}=" in facts["command"] for key in facts["changes"])
    assert facts["slurm"] == script.read_text()
    assert call("plan", "--gpus", "1", "--gpu", "rtx4090", "--size", "vit_7b").returncode == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("flops", ["--size", "vit_x"], "did you mean 'vit_"),
        ("memory", ["--strategy", "zero4"], "did you mean 'zero"),
        ("plan", ["--gpu", "h10"], "did you mean 'h100'"),
    ],
)
def test_mistakes_are_one_line(tool: str, arguments: list[str], message: str) -> None:
    done = call(tool, *arguments)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert len(lines) == 1
    assert message in lines[0]
