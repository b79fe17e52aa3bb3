"""A rank that hangs or dies is named, with its last step and its Python stack, and the others stop.

A thread of each rank writes `RUN/ranks/rank_R.json` every few seconds: where the rank is, and the stack of its main
thread. Whoever makes no progress for too long, or loses the others in a collective, reads what all ranks have written,
and says which of them is to blame:

- a rank that writes no more: its process has died, or is stopped; the stack is then its last
- else the ranks that have passed the fewest marks, since all ranks pass the same ones in the same order
- of several such, those that are not waiting in a collective themselves

The first to find out writes `RUN/ranks/failure.json` and says so; the threads of the others see the file and end their
processes. The run folder is on a file system that all ranks share, and outlives launcher and store.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.autograd.graph
import torch.distributed as dist

from nepa_scale.sharding import World
from nepa_scale.training import agreement
from nepa_scale.training.departure import EXIT_FAILURE, depart, on_departure
from nepa_scale.training.run_lock import process_space, process_started

FOLDER = "ranks"
PATIENCE = 6  # times the timeout: what saving, evaluation, and the first step (which may compile) are allowed
_STACK_LINES = 12


@dataclass
class _Place:
    """Where the main thread is, and since when."""

    step: int
    phase: str
    patient: bool
    since: float


class Watchdog:
    """For one rank; all ranks make one after `clear` has been called.

    run: the run folder
    timeout: seconds without progress, after which the run is given up
    agreed: exceptions that all ranks raise alike, and that nobody has to be told of
    brief: exceptions whose message says all, without a traceback
    """

    def __init__(
        self,
        run: Path,
        world: World,
        timeout: float,
        *,
        agreed: tuple[type[Exception], ...] = (),
        brief: tuple[type[Exception], ...] = (),
    ) -> None:
        self.folder, self.world, self.timeout = run / FOLDER, world, timeout
        self._agreed, self._brief = agreed, brief
        self._interval = min(5.0, timeout / 20)
        self._main = threading.get_ident()
        self._place = _Place(0, "starting", True, time.monotonic())
        self._marks, self._beats = 0, 0
        self._stopped = threading.Event()
        self._verdict = threading.Lock()
        on_departure(self._on_departure)
        self._beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @staticmethod
    def clear(run: Path) -> None:
        """Removes what the job before has left; the main rank only, before any rank makes its watchdog."""
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        (run / FOLDER).mkdir(parents=True)

    def at(self, step: int, phase: str, *, patient: bool = False) -> None:
        """The main thread gets to work on `phase` of `step`; all ranks call this alike."""
        self._marks += 1
        self._place = _Place(step, phase, patient, time.monotonic())

    def alive(self) -> None:
        """The phase makes progress."""
        self._place.since = time.monotonic()

    @contextmanager
    def patient(self, step: int, phase: str) -> Iterator[None]:
        """Within the context the rank may take `PATIENCE` times as long."""
        self.at(step, phase, patient=True)
        yield
        self.at(step, f"after {phase}")

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, self._agreed):
            self.fail(error)
        self.close()

    def close(self) -> None:
        """Stops watching: the run has come to its end."""
        self._stopped.set()
        with self._verdict:
            self._path(self.world.rank).unlink(missing_ok=True)

    def fail(self, error: Exception) -> NoReturn:
        """Ends this process for `error`, once it is known whether another rank is to blame for it."""
        if _lost_others(error):
            self._conclude(self._find_culprit(dead_only="timed out" not in str(error).lower()))
        brief = isinstance(error, self._brief)
        text = str(error).splitlines()[-1] if brief else "".join(traceback.format_exception(error)).strip()
        self._conclude(f"rank {self.world.rank} failed in {_where(self._report())}: {text}")
        raise AssertionError("unreachable")

    # what follows runs in the thread, but for `_conclude` and `_find_culprit` in `fail`

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._verdict:
                if self._stopped.is_set():
                    return
                self._beat()
                self._obey_failure()
                if self._stalled():
                    self._conclude(self._find_culprit(dead_only=False))

    def _stalled(self) -> bool:
        place = self._place
        allowed = self.timeout * PATIENCE if place.patient else self.timeout
        return time.monotonic() - place.since > allowed - 5 * self._interval  # the verdict takes the rest

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _beat(self) -> None:
        self._beats += 1
        _replace(self._path(self.world.rank), self._report())

    def _report(self) -> dict[str, Any]:
        place = self._place
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame is not None else []
        return {
            "rank": self.world.rank,
            "host": socket.gethostname(),
            "space": process_space(),
            "pid": os.getpid(),
            "started": process_started(os.getpid()),
            "beat": self._beats,
            "marks": self._marks,
            "step": place.step,
            "phase": place.phase,
            "patient": place.patient,
            "seconds": round(time.monotonic() - place.since, 1),
            "stack": [f"{item.filename}:{item.lineno} in {item.name}: {item.line}" for item in stack],
        }

    def _find_culprit(self, *, dead_only: bool) -> str | None:
        """Who is to blame, in words; None where nobody has died and `dead_only`."""
        before = self._read_all()
        deadline = time.monotonic() + 2.5 * self._interval
        while True:
            self._obey_failure()
            self._beat()
            now = self._read_all()
            dead = [report for report in now.values() if _is_dead(report)]
            if dead or time.monotonic() > deadline:
                break
            time.sleep(self._interval / 4)
        silent = [report for rank, report in now.items() if report["beat"] == before.get(rank, {}).get("beat")]
        missing = [rank for rank in range(self.world.size) if rank not in now]
        if dead:
            return _describe("has died", dead)
        if silent:
            return _describe("gives no sign of life (its process is stopped, or stuck outside of Python)", silent)
        if missing and dead_only:
            return f"rank {', '.join(map(str, missing))} has left"
        if dead_only:
            return None
        least = min(report["marks"] for report in now.values())
        behind = [report for report in now.values() if report["marks"] == least]
        busy = [report for report in behind if not _waits(report)]
        allowed = self.timeout * (PATIENCE if behind[0]["patient"] else 1)
        return _describe(f"made no progress for {allowed:.0f} s (train.timeout={self.timeout:g})", busy or behind)

    def _read_all(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world.size):
            try:
                found[rank] = json.loads(self._path(rank).read_text())
            except (OSError, ValueError):
                continue
        return found

    def _conclude(self, verdict: str | None) -> None:
        """Tells all ranks, says it once, and ends this process."""
        if verdict is None:
            return
        if self._announce(EXIT_FAILURE, verdict):
            print(f"error: {verdict}", file=sys.stderr, flush=True)
        depart(EXIT_FAILURE)

    def _announce(self, code: int, text: str) -> bool:
        """Whether this rank is the first to say why the run ends."""
        temporary = self.folder / f".failure.{self.world.rank}"
        try:
            temporary.write_text(json.dumps({"rank": self.world.rank, "code": code, "text": text}))
            os.link(temporary, self.folder / "failure.json")
        except FileExistsError:
            return False
        except OSError:
            return True  # it cannot be told through the folder: then it is said more than once
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _obey_failure(self) -> None:
        try:
            failure = json.loads((self.folder / "failure.json").read_text())
        except (OSError, ValueError):
            return
        depart(failure["code"])

    def _on_departure(self, code: int) -> None:
        if not self._stopped.is_set():
            self._announce(code, f"rank {self.world.rank} has left with status {code}")


def _lost_others(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed by peer"))
    )


def _is_dead(report: dict[str, Any]) -> bool:
    """Known at once for a process of this host; another host's falls silent."""
    return report["space"] == process_space() and process_started(report["pid"]) != report["started"]


def _waiting_files() -> tuple[str, ...]:
    """Files, and folders that end in a separator, whose code a rank runs while it waits for the others."""
    folders = [str(Path(dist.__file__).parent)]
    deepspeed = importlib.util.find_spec("deepspeed")  # found, not imported: that takes seconds
    if deepspeed is not None and deepspeed.origin is not None:
        folders.append(str(Path(deepspeed.origin).parent / "comm"))
    return (
        *(folder + os.sep for folder in folders),
        f"{torch.autograd.graph.__file__}:",
        f"{agreement.__file__}:",
        f"{__file__}:",
    )


_WAITING = _waiting_files()


def _waits(report: dict[str, Any]) -> bool:
    return bool(report["stack"]) and report["stack"][-1].startswith(_WAITING)


def _where(report: dict[str, Any]) -> str:
    return f"step {report['step']} ({report['phase']})"


def _describe(what: str, reports: list[dict[str, Any]]) -> str:
    ranks = ", ".join(str(report["rank"]) for report in reports)
    lines = [f"rank {ranks} {what}; the run stops"]
    for report in reports[:4]:
        lines.append(
            f"  rank {report['rank']} (process {report['pid']} on {report['host']}) was in {_where(report)} "
            f"for {report['seconds']:.0f} s; its Python stack, innermost last:"
        )
        lines += [f"    {entry}" for entry in report["stack"][-_STACK_LINES:]]
    return "\n".join(lines)


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Best effort: a full disk must not end a run that is well."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(values))
        temporary.replace(path)
    except OSError:
        pass
