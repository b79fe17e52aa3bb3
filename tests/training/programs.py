"""The real program, `nepa_scale/train.py`, as processes that start in no time.

Each rank is forked from a server that has imported everything once, with the variables that `srun` or a script of
one's own would set: to the program it is the launch of plain processes. Launchers proper are in `tests/launch.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import TINY
from tests.training.warm_server import warm_processes


def arguments_of(shards: Path, run: Path, *more: str) -> list[str]:
    """A tiny run; data is read in the training process."""
    return [*TINY, f"data.train={shards}", f"output={run}", "train.log_samples=true", "data.workers=0", *more]


class Program:
    """The ranks of one launch. `prepare(rank)` is called in each before the program begins; it must be picklable."""

    def __init__(
        self, arguments: list[str], ranks: int, output: Path, prepare: Callable[[int], None] | None = None
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for path in output.glob("*"):
            path.unlink()
        self.output = output
        self.ranks = [
            warm_processes().Process(target=_run, args=(rank, ranks, port, arguments, str(output), prepare))
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, number: int, rank: int) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        if self.ranks[rank].is_alive():
            os.kill(pid, number)

    def wait(self, timeout: float = 60) -> list[int]:
        """The exit codes; kills what is still running after `timeout` seconds, and says so."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        stuck = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        self.kill()
        assert not stuck, f"ranks {stuck} were still running after {timeout} s:\n{self.said()}"
        return [process.exitcode or 0 for process in self.ranks]

    def wait_until(self, found: Callable[[], bool], timeout: float = 60) -> None:
        """Returns when `found()` is true; fails where it never is, or all ranks end first."""
        deadline = time.monotonic() + timeout
        while not found():
            alive = any(process.is_alive() for process in self.ranks)
            if not alive or time.monotonic() > deadline:
                raise AssertionError(f"it never came to that:\n{self.said()}")
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self.ranks:
            if process.exitcode is None:
                process.kill()
            process.join()

    def wait_until_begun(self) -> None:
        """Returns when all ranks would notice a signal."""
        self.wait_until(lambda: all((self.output / f"begun_{rank}").exists() for rank in range(len(self.ranks))))

    def said(self) -> str:
        """What all ranks have printed."""
        return "".join(path.read_text() for path in sorted(self.output.glob("rank_*.txt")))


def _run(
    rank: int, ranks: int, port: int, arguments: list[str], output: str, prepare: Callable[[int], None] | None
) -> None:
    with open(f"{output}/rank_{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from nepa_scale.training.departure import depart
    from nepa_scale.training.signals import stop_signals

    stop_signals.install()  # as early as the program does
    Path(f"{output}/begun_{rank}").touch()
    if prepare is not None:
        prepare(rank)
    import torch

    from nepa_scale import train

    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    train.print_summary = lambda _folder: None  # its plots take longer than the training
    depart(train.main(arguments))


def steps_of(run: Path) -> list[int]:
    """The steps in metrics.jsonl so far, as a person would see them."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]


def losses_of(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def samples_of(run: Path) -> dict[int, list[str]]:
    """Step -> the keys of all ranks, sorted."""
    found: dict[int, list[str]] = {}
    for path in (run / "samples").glob("rank_*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(row["step"], []).extend(row["keys"])
    return {step: sorted(keys) for step, keys in found.items()}


def assert_same_history(run: Path, whole: Path) -> None:
    """Losses, bit for bit, and samples of every step are those of the run that nothing interrupted."""
    assert losses_of(run) == losses_of(whole)
    assert samples_of(run) == samples_of(whole)


def kill_everything_in(folder: Path) -> list[int]:
    """Kills what still runs with `folder` in its command line; its process ids. There should be none."""
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(path.parent.name)
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and pid != os.getpid():
            left.append(pid)
            os.kill(pid, signal.SIGKILL)
    return left


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
