"""Interrupts many short runs at random, and sees whether each goes on as if nothing had happened.

    python tests/training/trials.py signals --trials 50
    python tests/training/trials.py kills --trials 50 --seed 7

A trial starts a run of a random strategy (mostly as plain processes, some by torchrun and by deepspeed), interrupts it,
waits for all of its processes to end by themselves, starts it again, and compares the losses (bit for bit) and the
sample keys of every step with those of a run that nothing interrupted.

signals: SIGTERM, SIGINT or SIGUSR1 to one rank, to all (always so during start-up), or to the launcher, at a random
    moment from the start of the processes on: start-up, steps, saves and evaluations. The ranks must end within 30 s
    with status 75 (0 where the run was through), all steps made must have been saved, and no process may be left.
kills: SIGKILL at one of the points of a save (in turn), or of a rank or all at a random moment.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a program

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nepa_scale.training.fault_injection import FAULT_POINTS, VARIABLE
from nepa_scale.training.signals import EXIT_STOPPED
from tests.launch import REPOSITORY, TRAIN, launcher, write_shards
from tests.training.programs import Program, arguments_of, assert_same_history, kill_everything_in, steps_of

STEPS, EVERY, RANKS = 24, 4, 2
GRACE = 30.0  # seconds from a signal to the end of the last process
STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# of these the first that is reached kills; the one that is left out needs a step that is saved anew, and has a test
POINTS = tuple(point for point in FAULT_POINTS if point != "commit-replacing")
EVERY_RANK = tuple(point for point in POINTS if point.startswith(("save", "part")))


@dataclass(frozen=True)
class Launch:
    """How a trial's run is started."""

    strategy: str
    kind: str  # plain | torchrun | deepspeed

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else RANKS


class Slow:
    """Makes a step take some time, and sets the variables of a rank."""

    def __init__(self, seconds: float, **variables: str) -> None:
        self.seconds, self.variables = seconds, variables

    def __call__(self, rank: int) -> None:
        del rank
        from nepa_scale.training.pretraining import Pretraining

        os.environ |= self.variables
        inputs, seconds = Pretraining.inputs, self.seconds

        def slow(self, batch, step):  # type: ignore[no-untyped-def]
            time.sleep(seconds)
            return inputs(self, batch, step)

        Pretraining.inputs = slow  # type: ignore[method-assign]


class Trials:
    """Everything that trials share: data, and the histories of runs that nothing interrupted.

    launchers: whether some trials are started by torchrun and deepspeed
    """

    def __init__(self, folder: Path, strategies: tuple[str, ...] = STRATEGIES, *, launchers: bool = True) -> None:
        self.folder, self.strategies, self.launchers = folder, strategies, launchers
        self.shards = write_shards(folder / "data" / "train")
        self.val = write_shards(folder / "data" / "val", samples=13, seed=9)
        self._whole: dict[str, Path] = {}

    def whole(self, strategy: str) -> Path:
        """The history that all trials of a strategy have to end with."""
        if strategy not in self._whole:
            run = self.folder / f"whole_{strategy}"
            program = Program(self.arguments(run, strategy), Launch(strategy, "plain").ranks, self.folder / "said")
            assert set(program.wait(120)) == {0}, program.said()
            self._whole[strategy] = run
        return self._whole[strategy]

    def arguments(self, run: Path, strategy: str, *more: str) -> list[str]:
        common = [f"strategy={strategy}", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=2"]
        return arguments_of(self.shards, run, *common, "train.timeout=60", *more)

    def signals(self, number: int, chance: random.Random) -> str:
        """One trial; what it was, in words. Raises AssertionError."""
        launch = self._pick(number, chance)
        whole, run = self.whole(launch.strategy), self.folder / f"signals_{number}"
        sent = chance.choice(SIGNALS)
        evaluated = (
            [f"data.val={self.val}", "evaluate.every=3", "evaluate.batch_size=2"] if chance.random() < 0.3 else []
        )
        arguments = self.arguments(run, launch.strategy, *evaluated)
        at_start, step, delay = chance.random() < 0.25, chance.randrange(1, STEPS), chance.random()
        if launch.kind == "plain":
            program = Program(arguments, launch.ranks, self.folder / f"said_{number}", Slow(0.03))
            # ranks that have not found each other yet cannot tell each other
            one = chance.random() < 0.5 and not at_start
            ranks = [chance.randrange(launch.ranks)] if one else list(range(launch.ranks))
            if at_start:
                program.wait_until_begun()
                time.sleep(delay * 1.5)
            else:
                program.wait_until(lambda: len(steps_of(run)) >= step, 60)
                time.sleep(delay * 0.1)
            for rank in ranks:
                program.signal(sent, rank)
            codes = program.wait(GRACE)
            assert set(codes) in ({0}, {EXIT_STOPPED}), f"status {codes}\n{program.said()}"
            where = f"rank {ranks}"
        else:
            begins = time.monotonic()
            patience = 12 * delay if at_start else 120  # seconds; a launcher and its ranks take about 10 to start
            self._signal_launcher(
                launch, arguments, run, sent,
                lambda: time.monotonic() - begins > patience or (not at_start and len(steps_of(run)) >= step),
            )  # fmt: skip
            where = launch.kind
        made = steps_of(run)
        assert (max(made) if made else 0) <= _saved(run), f"steps to {max(made)} were made, {_saved(run)} are saved"
        self._finish(run, launch.strategy, whole, evaluated)
        return f"{launch.strategy}: {sent.name} to {where} {'at the start' if at_start else f'after step {step}'}"

    def kills(self, number: int, chance: random.Random) -> str:
        """One trial; what it was, in words. Raises AssertionError."""
        launch = Launch(self.strategies[number % len(self.strategies)], "plain")
        whole, run = self.whole(launch.strategy), self.folder / f"kills_{number}"
        at_point = number % 2 == 0
        point = POINTS[number // 2 % len(POINTS)]
        # the third save is the first after which one is retired
        nth = chance.choice((1, 2)) if point.startswith("retention-h") else chance.choice((1, 2, 3))
        rank = chance.randrange(launch.ranks) if point in EVERY_RANK else 0
        fault = {VARIABLE: f"{point}:{nth}:{rank}"} if at_point else {}
        program = Program(
            self.arguments(run, launch.strategy), launch.ranks, self.folder / f"said_{number}", Slow(0.03, **fault)
        )
        if at_point:
            words = f"at {point}, the {nth}. time, on rank {rank}"
        else:
            step, victims = chance.randrange(STEPS), list(range(launch.ranks))
            victims = victims if chance.random() < 0.5 else [chance.choice(victims)]
            program.wait_until(lambda: len(steps_of(run)) >= step, 60)
            time.sleep(chance.random() * 0.1)
            for victim in victims:
                program.signal(signal.SIGKILL, victim)
            words = f"of rank {victims} after step {step}"
        codes = program.wait(GRACE)
        assert -signal.SIGKILL in codes or (not at_point and set(codes) == {0}), f"status {codes}\n{program.said()}"
        assert all(code in (-signal.SIGKILL, 0, 1) for code in codes), f"status {codes}\n{program.said()}"
        self._finish(run, launch.strategy, whole, [])
        return f"{launch.strategy}: SIGKILL {words}"

    def _pick(self, number: int, chance: random.Random) -> Launch:
        kind = {3: "torchrun", 7: "deepspeed"}.get(number % 10, "plain") if self.launchers else "plain"
        some = {"torchrun": ("ddp", "fsdp"), "deepspeed": ("zero1", "zero2", "zero3")}.get(kind, self.strategies)
        return Launch(chance.choice(some), kind)

    def _signal_launcher(
        self, launch: Launch, arguments: list[str], run: Path, sent: signal.Signals, ready: Callable[[], bool]
    ) -> None:
        """Starts by the launcher, signals it when `ready`, and waits for the end of all processes."""
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
        said = self.folder / "launched.txt"
        with said.open("wb") as output:
            process = subprocess.Popen(
                [*launcher(launch.kind, launch.ranks), str(TRAIN), *arguments],
                env=variables, cwd=REPOSITORY, stdout=output, stderr=output,
            )  # fmt: skip
        while not ready() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sent)
        began = time.monotonic()
        process.wait(GRACE + 5)
        while (left := _running(run)) and time.monotonic() - began < GRACE:
            time.sleep(0.1)
        if left:
            kill_everything_in(run)
            raise AssertionError(f"{left} processes were left behind\n{said.read_text()}")

    def _finish(self, run: Path, strategy: str, whole: Path, evaluated: list[str]) -> None:
        ranks = Launch(strategy, "plain").ranks
        program = Program(self.arguments(run, strategy, *evaluated), ranks, self.folder / "said")
        codes = program.wait(120)
        assert set(codes) == {0}, f"status {codes} of the resumed run\n{program.said()}"
        assert_same_history(run, whole)


def _saved(run: Path) -> int:
    latest = run / "checkpoints" / "latest"
    return int(latest.resolve().name.removeprefix("step_")) if latest.exists() else 0


def _running(run: Path) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += str(run).encode() in path.read_bytes()
        except OSError:
            continue
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("signals", "kills"))
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial (to repeat one that failed)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed: list[str] = []
    kinds: Counter[str] = Counter()
    columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("trials", total=arguments.trials)
        trials = Trials(Path(folder))
        for number in range(arguments.first, arguments.first + arguments.trials):
            try:
                words = getattr(trials, arguments.what)(number, random.Random(f"{arguments.seed} {number}"))
                kinds[words.split(":")[0]] += 1
                print(f"{number}: {words}", flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed.append(f"{number}: {error}")
                print(f"{number}: FAILED: {error}", flush=True)
            bar.advance(task)
    by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    print(f"{arguments.what}: {arguments.trials - len(failed)} of {arguments.trials} passed ({by_kind})")
    return 1 if failed else 0


if __name__ == "__main__":
    from tests.training import trials  # as the module that the ranks know, not as __main__

    sys.exit(trials.main())
