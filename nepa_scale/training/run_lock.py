"""One job writes a run folder: `RUN/run.lock` says which.

The file names the job's process, that process's start time, and the space in which process numbers mean anything: a
boot of a host and, of that, a container's namespace. It is touched every minute. So a lock is known to be stale when
its process is gone from this space, whatever now has its number; from any other space (another host or container, or
this host before it was started anew), when it was not touched for five minutes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nepa_scale.config import ConfigError

LOCK = "run.lock"
REFRESH_SECONDS = 60.0
STALE_SECONDS = 300.0


class RunLock:
    """Held from construction until `release` or the end of the process; for the main rank only.

    run: the run folder; created if need be
    refresh, stale: seconds between touches, and without a touch until another space's lock counts for nothing
    Raises:
        ConfigError: another job that may be alive holds it, or the folder cannot be written.
    """

    def __init__(self, run: Path, *, refresh: float = REFRESH_SECONDS, stale: float = STALE_SECONDS) -> None:
        self.path = run / LOCK
        pid = os.getpid()
        started = process_started(pid)
        self._me = {"host": socket.gethostname(), "space": process_space(), "pid": pid, "started": started}
        try:
            run.mkdir(parents=True, exist_ok=True)
            with _alone(run):
                self._require_free(stale)
                temporary = run / f".{LOCK}.{self._me['host']}.{os.getpid()}"
                temporary.write_text(json.dumps(self._me) + "\n")
                temporary.replace(self.path)
        except OSError as error:
            raise ConfigError(
                f"cannot lock the run folder {run}: {error.strerror}; choose another (output=)"
            ) from error
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, args=(refresh,), name="run lock", daemon=True).start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the folder free; does nothing the second time."""
        if not self._released.is_set():
            self._released.set()
            with contextlib.suppress(OSError), _alone(self.path.parent):
                if _read(self.path) == self._me:
                    self.path.unlink()

    def _keep_fresh(self, every: float) -> None:
        while not self._released.wait(every):
            with contextlib.suppress(OSError):
                if _read(self.path) == self._me:  # else it was taken over, while this process was suspended
                    os.utime(self.path)

    def _require_free(self, stale: float) -> None:
        holder = _read(self.path)
        if holder is None or holder == self._me:
            return
        if holder["space"] == self._me["space"]:
            alive = process_started(holder["pid"]) == holder["started"]
            hint = "stop it first"
        else:
            age = _age(self.path)
            alive = age < stale
            hint = f"stop it first; if it is dead, its lock lapses in {max(stale - age, 0):.0f} s"
        if alive:
            raise ConfigError(
                f"{self.path.parent} is being written by another job (process {holder['pid']} on {holder['host']}): "
                f"{hint}, or choose another folder with output="
            )


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One process at a time looks at the lock and replaces it.

    Where a file system has no such locks, two jobs would have to start within the same milliseconds to be both let in.
    """
    descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    """The holder; None without one, or if what is there was not written by this program."""
    try:
        holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    complete = isinstance(holder, dict) and {"host", "space", "pid", "started"} <= holder.keys()
    return holder if complete else None


def _age(path: Path) -> float:
    """Seconds since the last touch, by the clock of the file system alone: hosts' clocks differ."""
    probe = path.with_name(f".{LOCK}.clock.{os.getpid()}")
    probe.write_text("")
    try:
        return max(probe.stat().st_mtime - path.stat().st_mtime, 0.0)
    finally:
        probe.unlink()


def process_space() -> str:
    """Where this process's number means anything: changes with the host, its boots, and its containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_started(pid: int) -> str | None:
    """When the process started, in the kernel's ticks; None if there is none, or if it is dead and only unburied."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return None
    else:
        return None if state in "ZX" else fields[18]
    try:  # no /proc: all that can be known is that there is such a process
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
