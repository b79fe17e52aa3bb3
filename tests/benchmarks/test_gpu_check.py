"""benchmarks/gpu_check.py: its small version, end to end, where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import REPOSITORY, write_shards


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the whole of it would run")
def test_the_small_version_runs_on_a_cpu(tmp_path: Path) -> None:
    output, shards = tmp_path / "check.json", write_shards(tmp_path / "shards")
    command = [sys.executable, "benchmarks/gpu_check.py", "--shards", str(shards), "--output", str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    steps = [(row["strategy"], row["recompute"]) for row in rows]
    assert steps[:5] == [(name, "none") for name in ("single", "plain PyTorch", "fsdp", "zero1", "zero3")]
    assert all(row["images_per_second"] > 0 and row["batch"] == 4 for row in rows)
    assert "| vit_ti | zero3 | none | 4 |" in output.with_suffix(".md").read_text()


def test_what_the_time_does_not_suffice_for_is_said(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--minutes", "0", "--output", str(output)], capture_output=True,
        text=True, timeout=240, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["not_run"] for row in json.loads(output.read_text())["rows"]} == {"out of time"}
    assert "not run: out of time" in output.with_suffix(".md").read_text()
