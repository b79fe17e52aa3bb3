"""The benchmark of checkpoints runs, and what it reports is of the right kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    options = ["--size", "vit_ti", "--ranks", "2", "--rounds", "1", "--folder", str(tmp_path)]
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "checkpoint.py"),
            *options,
            "--json",
            str(tmp_path / "numbers.json"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    facts = json.loads((tmp_path / "numbers.json").read_text())
    numbers = facts["ranks"]["2"]
    assert 0 < numbers["stall_seconds"] < numbers["synchronous_seconds"]
    assert numbers["write_rate_to_dd"] > 0
    assert "| stall / synchronous time |" in (tmp_path / "numbers.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "numbers.md"]
