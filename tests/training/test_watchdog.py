"""A rank that hangs, is stopped, dies or fails: the others end in time, and the message says who, where and how."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, TRAIN, launcher, metrics, write_shards
from tests.training.programs import Program, arguments_of, assert_same_history, kill_everything_in, steps_of

TIMEOUT = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


def in_step(rank: int, *, on: int, step: int, what: str) -> None:
    """Something befalls one rank in a step."""
    from nepa_scale.training.pretraining import Pretraining

    inputs = Pretraining.inputs

    def lies_down_here() -> None:
        if what == "hangs":
            time.sleep(1000)
        if what == "raises":
            raise LookupError("an ordinary mistake")
        os.kill(os.getpid(), signal.SIGKILL if what == "dies" else signal.SIGSTOP)

    def befallen(self, batch, index):  # type: ignore[no-untyped-def]
        if rank == on and index == step - 1:
            lies_down_here()
        return inputs(self, batch, index)

    Pretraining.inputs = befallen  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("what", "strategy", "said"),
    [
        ("hangs", "fsdp", "rank 1 made no progress for 6 s (train.timeout=6)"),
        ("is stopped", "ddp", "rank 1 gives no sign of life"),
        ("dies", "zero3", "rank 1 has died"),
        ("raises", "fsdp", "rank 1 failed in step 4 (computing): Traceback"),
    ],
)
def test_the_others_stop_and_the_rank_is_named(
    what: str, strategy: str, said: str, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(shards, run, f"strategy={strategy}", f"train.timeout={TIMEOUT}")
    program = Program(arguments, 2, tmp_path / "said", functools.partial(in_step, on=1, step=4, what=what))
    program.wait_until(lambda: len(steps_of(run)) == 3)
    began = time.monotonic()
    program.ranks[0].join(60)
    took = time.monotonic() - began
    if what == "is stopped":
        program.signal(signal.SIGKILL, 1)
    codes = program.wait(20)
    assert codes[0] == 1, program.said()
    assert codes[1] == {"hangs": 1, "raises": 1}.get(what, -signal.SIGKILL)
    assert took < (TIMEOUT + 2 if what in ("hangs", "is stopped") else 3)
    text = program.said()
    assert text.count("error: ") == 1, text
    assert said in text
    if what == "hangs":
        assert "was in step 4 (computing)" in text
    if what in ("hangs", "raises"):  # of a process that is gone only the last beat's stack is known
        assert "in lies_down_here" in text
    else:
        assert "its Python stack" in text
    assert what != "raises" or "LookupError: an ordinary mistake" in text


def test_a_job_in_which_all_is_well_leaves_nothing_behind(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # every step takes longer than a beat, and the whole run longer than the timeout
    program = Program(
        arguments_of(shards, run, "strategy=ddp", "train.timeout=1", "train.steps=8"), 2, tmp_path / "said", slowly
    )
    assert program.wait() == [0, 0], program.said()
    assert list((run / "ranks").iterdir()) == []


def slowly(rank: int) -> None:
    from nepa_scale.training.pretraining import Pretraining

    inputs = Pretraining.inputs

    def slow(self, batch, index):  # type: ignore[no-untyped-def]
        time.sleep(0.3 if rank == 0 else 0)
        return inputs(self, batch, index)

    Pretraining.inputs = slow  # type: ignore[method-assign]


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_rank(shards: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    common = ["strategy=fsdp", "train.steps=6", "checkpoint.every=2"]
    program = Program(arguments_of(shards, whole, *common), 2, tmp_path / "said")
    assert program.wait() == [0, 0], program.said()
    command = launcher("torchrun", 2)
    command[command.index("--nproc_per_node") : command.index("--nproc_per_node")] = ["--max-restarts", "1"]
    # in the first life rank 1 is killed when it begins its third save; the second life has one or two to make
    done = subprocess.run(
        [*command, str(TRAIN), *arguments_of(shards, run, *common)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "NEPA_FAULT": "save-begun:3:1"},
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
    )  # fmt: skip
    assert kill_everything_in(run) == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 has died" in done.stderr
    assert "resumed after step 4" in done.stdout
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert_same_history(run, whole)


def test_a_rank_waits_where_its_innermost_frame_is_in_a_collective() -> None:
    """Known by the modules' own files, wherever they are installed and whatever others are called."""
    import deepspeed.comm.comm
    import torch.autograd.graph
    import torch.distributed as dist

    from nepa_scale.training import agreement, watchdog

    def waits(file: str | None) -> bool:
        return watchdog._waits({"stack": [f"{__file__}:3 in main: x()", f"{file}:7 in f: wait()"]})

    waiting = (
        dist.distributed_c10d,
        dist.nn.functional,
        torch.autograd.graph,
        deepspeed.comm.comm,
        agreement,
        watchdog,
    )
    assert all(waits(module.__file__) for module in waiting)
    for file in (
        __file__,
        torch.__file__,
        deepspeed.__file__,
        "/home/user/training/agreement.py",
        "/x/deepspeed/comm/a.py",
    ):
        assert not waits(file)
    assert not watchdog._waits({"stack": []})
