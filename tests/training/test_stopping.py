"""Signals at chosen moments of the real program, started as plain processes, by torchrun and by deepspeed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nepa_scale.training.signals import EXIT_STOPPED
from tests.launch import REPOSITORY, TRAIN, launcher, write_shards
from tests.training.programs import (
    Program,
    arguments_of,
    assert_same_history,
    kill_everything_in,
    losses_of,
    read_json_lines,
    steps_of,
)

STEPS = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "val", samples=13, seed=9)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    program = Program(arguments(shards, folder / "run"), 2, folder / "said")
    assert program.wait() == [0, 0], program.said()
    return folder / "run"


def arguments(shards: Path, run: Path, *more: str) -> list[str]:
    return arguments_of(shards, run, "strategy=fsdp", f"train.steps={STEPS}", "checkpoint.every=0", *more)


def slowly(rank: int) -> None:
    """A step takes a tenth of a second at least, so that a signal finds the run under way."""
    del rank
    from nepa_scale.training.pretraining import Pretraining

    inputs = Pretraining.inputs

    def slow(self, batch, step):  # type: ignore[no-untyped-def]
        time.sleep(0.1)
        return inputs(self, batch, step)

    Pretraining.inputs = slow  # type: ignore[method-assign]


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").resolve().name.removeprefix("step_"))


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, [1]), (signal.SIGUSR1, [0, 1])], ids=["TERM on one", "USR1 on all"]
)
def test_a_signal_saves_and_stops_all_ranks_after_the_same_step(
    number: signal.Signals, ranks: list[int], shards: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    program = Program(arguments(shards, run), 2, tmp_path / "said", slowly)
    program.wait_until(lambda: len(steps_of(run)) >= 3)
    seen = len(steps_of(run))
    for rank in ranks:
        program.signal(number, rank)
    assert program.wait(30) == [EXIT_STOPPED] * 2, program.said()
    assert f": {number.name}; the same command goes on from here" in program.said()
    step = saved_step(run)
    assert seen <= step <= seen + 3
    assert steps_of(run)[-1] == step
    assert not (run / "run.lock").exists()
    resumed = Program(arguments(shards, run), 2, tmp_path / "resumed")
    assert resumed.wait() == [0, 0], resumed.said()
    assert_same_history(run, whole)


def stuck_in_step_4(rank: int) -> None:
    from nepa_scale.training.pretraining import Pretraining

    inputs = Pretraining.inputs

    def stuck(self, batch, step):  # type: ignore[no-untyped-def]
        if step == 3 and rank == 1:
            time.sleep(1000)
        return inputs(self, batch, step)

    Pretraining.inputs = stuck  # type: ignore[method-assign]


def test_a_second_signal_ends_a_rank_at_once_though_it_sits_in_a_collective(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = Program(arguments(shards, run), 2, tmp_path / "said", stuck_in_step_4)
    program.wait_until(lambda: len(steps_of(run)) >= 3)
    program.signal(signal.SIGINT, 0)
    time.sleep(0.5)
    assert program.ranks[0].is_alive()
    program.signal(signal.SIGINT, 0)
    began = time.monotonic()
    program.ranks[0].join(10)
    assert time.monotonic() - began < 2
    assert program.ranks[0].exitcode == EXIT_STOPPED
    assert program.wait(30) == [EXIT_STOPPED] * 2  # the other hears that this one has left
    assert "stops at once: a second signal (SIGINT)" in program.said()


def late(rank: int) -> None:
    """The job is asked to stop while it still builds its strategy."""
    from nepa_scale import train

    build = train.build_strategy

    def slow(*arguments, **more):  # type: ignore[no-untyped-def]
        Path(os.environ["STARTED"]).touch()
        time.sleep(60 if rank == 0 else 0)
        return build(*arguments, **more)

    train.build_strategy = slow


def test_before_the_first_step_there_is_nothing_to_save(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = Program(arguments(shards, run), 2, tmp_path / "said", MarkedStart(tmp_path / "started"))
    program.wait_until((tmp_path / "started").exists)
    program.signal(signal.SIGTERM, 0)
    assert program.wait(20) == [EXIT_STOPPED] * 2, program.said()
    assert "rank 0 stops before the first step: SIGTERM" in program.said()
    assert not (run / "run.lock").exists()
    assert not (run / "checkpoints" / "latest").exists()


class MarkedStart:
    """`late`, told where to say that it has begun."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, rank: int) -> None:
        os.environ["STARTED"] = str(self.mark)
        late(rank)


class SlowEvaluation:
    """The second evaluation of the run takes long."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, rank: int) -> None:
        del rank
        from nepa_scale.evaluation import online

        passes: list[int] = []  # two an evaluation: over the bank, and over the queries
        features = online.backbone_features

        def slow(strategy, seen):  # type: ignore[no-untyped-def]
            passes.append(1)
            inner = features(strategy, seen)

            def each(batch):  # type: ignore[no-untyped-def]
                if len(passes) in (3, 4):
                    self.mark.touch()
                    time.sleep(0.5)
                return inner(batch)

            return each

        online.backbone_features = slow


def test_a_signal_during_an_evaluation_postpones_it(shards: Path, val: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluated = [f"data.val={val}", "evaluate.every=3", "evaluate.batch_size=2", "train.steps=5"]
    program = Program(arguments(shards, run, *evaluated), 2, tmp_path / "said", SlowEvaluation(tmp_path / "evaluating"))
    program.wait_until((tmp_path / "evaluating").exists)
    program.signal(signal.SIGTERM, 1)
    assert program.wait(20) == [EXIT_STOPPED] * 2, program.said()
    assert saved_step(run) == 3
    assert [row["step"] for row in read_json_lines(run / "metrics.jsonl") if "knn_top1" in row] == [0]
    resumed = Program(arguments(shards, run, *evaluated), 2, tmp_path / "resumed")
    assert resumed.wait() == [0, 0], resumed.said()
    assert [row["step"] for row in read_json_lines(run / "metrics.jsonl") if "knn_top1" in row] == [0, 3, 5]
    assert sorted(losses_of(run)) == [1, 2, 3, 4, 5]


# launchers


@pytest.fixture
def launched(shards: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The data and the run folder; kills what the test leaves running, and fails if there was anything."""
    run = tmp_path / "run"
    yield str(shards), run
    left = kill_everything_in(run)
    assert left == [], f"processes were left behind: {left}"


def start(kind: str, arguments: list[str], said: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    with said.open("wb") as output:
        return subprocess.Popen(
            [*launcher(kind, 2), str(TRAIN), *arguments], env=environment, cwd=REPOSITORY, stdout=output, stderr=output
        )


def gone(folder: Path, within: float) -> bool:
    """Whether no process names the run any more."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(str(folder).encode() in read(path) for path in Path("/proc").glob("[0-9]*/cmdline")):
            return True
        time.sleep(0.1)
    return False


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_a_launcher_that_is_told_to_end_leaves_a_checkpoint_and_no_process(
    kind: str, launched: tuple[str, Path], tmp_path: Path
) -> None:
    shards, run = launched
    said = tmp_path / "said.txt"
    strategy = "strategy=fsdp" if kind == "torchrun" else "strategy=zero1"
    process = start(kind, [*arguments_of(Path(shards), run, strategy, "train.steps=100000", "data.workers=1")], said)
    deadline = time.monotonic() + 90
    while len(steps_of(run)) < 3:
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    assert gone(run, within=30), said.read_text()
    assert saved_step(run) >= 3
    assert steps_of(run)[-1] == saved_step(run)
