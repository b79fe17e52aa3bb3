"""Predicted memory at world sizes that this machine cannot run.

The real step of rank 0 in a world of torch's fake process group. DDP's reducer does not work with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import REPOSITORY


@pytest.mark.parametrize(
    ("strategy", "size", "recompute"),
    [
        ("fsdp", 64, "full"),
        pytest.param("fsdp", 8, "none", marks=pytest.mark.slow),
        pytest.param("zero1", 64, "none", marks=pytest.mark.slow),
        pytest.param("zero2", 64, "none", marks=pytest.mark.slow),
        pytest.param("zero3", 64, "full", marks=pytest.mark.slow),
        pytest.param("zero3", 8, "none", marks=pytest.mark.slow),
    ],
)
def test_predicted_is_within_five_percent_of_measured(strategy: str, size: int, recompute: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.profiling.fake_world", strategy, str(size), recompute],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=240, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    predicted, measured = found["predicted"], found["measured"]
    assert sum(predicted.values()) == pytest.approx(measured["total"], rel=0.05)
    for kind in ("parameters", "masters", "moments", "ema"):  # a 64th or an 8th of the whole, and padding
        assert predicted[kind] == pytest.approx(measured.get(kind, 0), rel=0.05), kind
