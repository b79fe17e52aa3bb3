"""Two jobs never write one run folder, and a dead job keeps nobody out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nepa_scale.config import ConfigError
from nepa_scale.training.run_lock import LOCK, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from nepa_scale.config import ConfigError
from nepa_scale.training.run_lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]))
except ConfigError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
time.sleep(60)
"""
ROOT = Path(__file__).resolve().parents[2]


def start_holder(run: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_holder(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def rewrite(run: Path, **changes: Any) -> None:
    """Changes what the lock says of its holder."""
    path = run / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_second_job_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is being written by another job .process {holder.pid} on "):
        RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid


def test_the_lock_of_a_killed_job_is_taken_over(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    # not yet waited for: the kernel still has an entry for the dead process
    deadline = time.monotonic() + 10
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
    RunLock(tmp_path).release()
    holder.wait()
    start = start_holder(tmp_path)
    assert start.stdout is not None
    assert start.stdout.readline() == "held\n"
    start.kill()
    start.wait()
    RunLock(tmp_path).release()


def test_another_process_with_the_number_of_a_dead_one_is_not_the_holder(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    del holder
    rewrite(tmp_path, started="1")
    RunLock(tmp_path).release()


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"host": "elsewhere", "space": "another boot pid:[1]"},
        lambda space: {"space": f"{space.split()[0]} pid:[1]"},
        lambda space: {"space": f"another boot {space.split(maxsplit=1)[1]}"},
    ],
    ids=["another host", "another container of this host", "this host before it was started anew"],
)
def test_a_lock_whose_process_cannot_be_seen_lapses_when_it_is_no_longer_touched(
    change: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    RunLock(tmp_path)._released.set()
    space = json.loads((tmp_path / LOCK).read_text())["space"]
    # no process has this number here, which says nothing of another space
    rewrite(tmp_path, pid=2**22 + 1, **change(space))
    with pytest.raises(ConfigError, match=r": stop it first; if it is dead, its lock lapses in [23]?\d\d s"):
        RunLock(tmp_path)
    old = time.time() - 301
    os.utime(tmp_path / LOCK, (old, old))
    RunLock(tmp_path).release()


def test_a_held_lock_is_touched(tmp_path: Path) -> None:
    with RunLock(tmp_path, refresh=0.02):
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_releasing_frees_the_folder_and_nothing_of_others(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    assert not (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    rewrite(tmp_path, pid=1)
    lock.release()
    assert (tmp_path / LOCK).exists()


def test_a_torn_lock_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "x"')
    RunLock(tmp_path).release()


def test_of_many_that_start_at_once_over_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    RunLock(tmp_path)._released.set()
    rewrite(tmp_path, started="1")
    jobs = [start_holder(tmp_path) for _ in range(4)]
    said = []
    for job in jobs:
        assert job.stdout is not None
        said.append(job.stdout.readline())
    for job in jobs:
        job.kill()
        job.wait()
    assert sorted(line.split()[0] == "held" for line in said) == [False, False, False, True]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot lock the run folder .*Not a directory"):
        RunLock(tmp_path / "file" / "run")
