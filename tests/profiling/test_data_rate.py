"""The rate of the data stream, by the tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, write_shards


def throughput(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = str(REPOSITORY / "tools" / "throughput.py")
    return subprocess.run([sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_streams_rate_and_the_share_of_each_stage(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {patch_size: 8, image_size: 32}\n")
    shards = write_shards(tmp_path / "shards")
    done = throughput(
        "--config", tmp_path / "run.yaml", "--data-only", f"data.train={shards}", "data.workers=1", "--batch", 8,
        "--batches", 4, "--rounds", 3, "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["data_only"] is True
    assert facts["workers"] == 1
    low, high = facts["spread"]
    assert 0 < low <= facts["images_per_second"] <= high
    assert facts["images_per_second_per_core"] > 0
    assert facts["stages"].keys() == {"read", "decode", "resize", "rest"}
    assert sum(facts["stages"].values()) == pytest.approx(1)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}\n")
    shards = write_shards(tmp_path / "shards")
    done = throughput("--config", tmp_path / "run.yaml", "--data-only", f"data.train={shards}")
    assert done.returncode == 2
    assert done.stderr == "error: data.train holds 40 images, and the measurement takes batches of 64\n"
