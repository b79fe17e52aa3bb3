"""What a run sees when it is killed again and again, and goes on with another number of ranks each time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, TINY, TRAIN, launcher, run_training, write_shards

STEPS = 120  # of 8 samples: 24 epochs
RANKS = (2, 1, 2)
KILLS = 20


@pytest.mark.slow
def test_a_run_killed_anywhere_sees_what_the_uninterrupted_one_sees(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    common = [
        *TINY, f"data.train={shards}", f"train.steps={STEPS}", "train.log_samples=true", "checkpoint.every=1",
        "schedule.warmup_steps=2", "strategy=ddp",
    ]  # fmt: skip
    assert run_training([*common, f"output={tmp_path / 'whole'}", "checkpoint.every=0"]).returncode == 0
    run, chance = tmp_path / "run", random.Random(KILLS)
    reached, places = 0, []
    for trial in range(KILLS):
        last = STEPS * (trial + 1) // (2 * KILLS)  # a fast machine makes many steps before it is killed: half are left
        place = chance.randint(min(reached + 1, last), last)
        places.append(
            kill_at(place, chance.uniform(0, 0.3), [*common, f"output={run}"], RANKS[trial % len(RANKS)], run)
        )
        reached = places[-1]
    done = run_training([*common, f"output={run}"], "torchrun", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step" in done.stdout
    assert 0 < places[0] < places[-1] < STEPS
    assert keys_of_steps(run) == keys_of_steps(tmp_path / "whole")


def kill_at(step: int, delay: float, arguments: list[str], ranks: int, run: Path) -> int:
    """Kills all processes of the run some time after it has made that step; returns the step it reached."""
    process = subprocess.Popen(
        [*launcher("torchrun", ranks), str(TRAIN), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        give_up = time.monotonic() + 120
        while last_step(run) < step:
            assert process.poll() is None, process.stderr.read().decode()[-3000:] if process.stderr else ""
            assert time.monotonic() < give_up, f"step {step} was not reached"
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        for pid in processes_of(run):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    while processes_of(run):
        time.sleep(0.05)
    return last_step(run)


def processes_of(run: Path) -> list[int]:
    """The launcher and the ranks, whose arguments name the run folder. Their data workers end with them."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"output={run}".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def last_step(run: Path) -> int:
    rows = rows_of(run / "samples" / "rank_0.jsonl")
    return max(rows, default=0)


def rows_of(file: Path) -> dict[int, list[str]]:
    rows = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # half a line: it is being written, or its writer was killed
            continue
        assert row["step"] not in rows
        rows[row["step"]] = row["keys"]
    return rows


def keys_of_steps(run: Path) -> list[list[str]]:
    """The samples of each global batch, in order."""
    ranks = [rows_of(file) for file in sorted((run / "samples").glob("rank_*.jsonl"))]
    return [[key for rows in ranks for key in rows.get(step, [])] for step in range(1, STEPS + 1)]
