"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop: it ends its step, saves, and exits with `EXIT_STOPPED`.

A thread hears of them through a pipe, so that a second signal ends a process whose main thread sits in a collective.
The same thread watches the launcher: torchrun can be killed, and the `deepspeed` runner dies of SIGTERM without a word
to its ranks, which would then train on for nobody. The end of a launcher counts as a signal.

Imported before anything that takes time: nothing of torch here.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from nepa_scale.training.departure import depart

EXIT_STOPPED = 75  # sysexits.h: a temporary failure, try again; the same command goes on where this one stopped
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ORPHANED = int(signal.SIGHUP)  # what the end of the launcher is counted as
_RELAY_SECONDS = 2.0  # launchers pass on a signal that the terminal has sent to all processes already
_TEARDOWN_SECONDS = 10.0
_POLL_SECONDS = 0.5


class StopSignals:
    """What this process was asked to do; nothing before `install`."""

    def __init__(self) -> None:
        self._asked, self._when = 0, 0.0
        self._trains = False
        self._leave_by: float | None = None
        self._launchers: list[int] = []

    def install(self) -> None:
        """Takes the signals over; in the main thread."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # first: what a handler takes must not get lost
        for number in STOPPING:
            signal.signal(number, lambda *_: None)
        self._launchers = launchers()
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def asked(self) -> int:
        """0, or the number of the signal that asks this rank to stop; see `describe`."""
        return self._asked

    def training_begins(self) -> None:
        """From here on a stop has to wait for the end of a step; before, there is nothing to save."""
        self._trains = True
        if self._asked:  # came between the thread's look and this
            self._leave("was asked to stop before the first step")

    def saved(self) -> None:
        """All is safe: what remains may take `_TEARDOWN_SECONDS`, and a signal now ends the process at once."""
        self._leave_by = time.monotonic() + _TEARDOWN_SECONDS

    def _watch(self, pipe: int) -> None:
        while True:
            ready, _, _ = select.select([pipe], [], [], _POLL_SECONDS)
            for number in os.read(pipe, 64) if ready else b"":
                if number in STOPPING:
                    self._ask(number)
            if not self._asked and _orphaned(self._launchers):
                self._ask(_ORPHANED)
            if self._leave_by is not None and time.monotonic() > self._leave_by:
                depart(EXIT_STOPPED)

    def _ask(self, number: int) -> None:
        now = time.monotonic()
        if not self._asked:
            self._asked, self._when = number, now
            if not self._trains:
                self._leave(f"stops before the first step: {describe(number)}")
            return
        if self._leave_by is not None:
            depart(EXIT_STOPPED)
        if now - self._when > (_RELAY_SECONDS if self._launchers else 0.0):
            self._leave(f"stops at once: a second signal ({describe(number)})")

    def _leave(self, why: str) -> None:
        print(f"rank {os.environ.get('RANK', '0')} {why}", file=sys.stderr, flush=True)
        depart(EXIT_STOPPED)


stop_signals = StopSignals()


def describe(number: int) -> str:
    """The name of a signal that `StopSignals.asked` returned."""
    return "the launcher has ended" if number == _ORPHANED else signal.Signals(number).name


def launchers() -> list[int]:
    """The processes without which this one is an orphan, from its parent up: torchrun, or deepspeed's two."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    if "deepspeed.launcher.launch" not in _command(parent):
        return []
    runner, group = _parent_and_group(parent)
    # it may have died before this process began: then init has adopted its child, which is not a leader as init's own
    # children are
    return [parent, runner] if "deepspeed" in _command(runner) or (runner == 1 and group != parent) else [parent]


def _orphaned(launchers: list[int]) -> bool:
    if launchers and os.getppid() != launchers[0]:
        return True
    return len(launchers) == 2 and (launchers[1] == 1 or _parent_and_group(launchers[0])[0] != launchers[1])


def _parent_and_group(pid: int) -> tuple[int, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[1]), int(fields[2])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
