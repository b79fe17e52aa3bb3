"""What a person sees while a run trains."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0  # of a log file
T = TypeVar("T")


class TerminalProgress:
    """One live line on a terminal; elsewhere (a log file) one line for each logged step."""

    COLUMNS = ("loss", "images_per_second")

    def __init__(self, start: int, total: int, enabled: bool) -> None:
        self._console = Console(stderr=False)
        self._live: Progress | None = None
        self._enabled = enabled
        self._start, self._total, self._began = start, total, time.monotonic()
        if enabled and self._console.is_terminal:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._live.add_task("train", total=total, completed=start, numbers="")
            self._live.start()

    def update(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics."""
        if not self._enabled:
            return
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        numbers = f"loss {loss}   {row['images_per_second']:,.0f} images/s"
        if self._live is not None:
            self._live.update(self._task, completed=row["step"], numbers=numbers)
            return
        done = max(row["step"] - self._start, 1)
        left = (time.monotonic() - self._began) / done * (self._total - row["step"])
        with _nobody_may_listen():
            print(f"step {row['step']}/{self._total}   {numbers}   {format_duration(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line without disturbing the live one."""
        if self._enabled:
            with _nobody_may_listen():
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def with_progress(items: Iterable[T], title: str, count: int) -> Iterator[T]:
    """Passes `count` items on, with rate and time left on stderr: a live line on a terminal; elsewhere, as in a log
    file, a line every now and then."""
    console, began = Console(stderr=True), time.monotonic()
    said, live = began, None
    if console.is_terminal:
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[rate]}"))
        live = Progress(TextColumn(title), *columns, TimeRemainingColumn(), console=console, transient=True)
        task = live.add_task(title, total=count, rate="")
    with live or contextlib.nullcontext():
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            rate = done / max(now - began, 1e-9)
            if live is not None:
                live.update(task, completed=done, rate=f"{rate:,.3g}/s")
            elif now > said + SECONDS_BETWEEN_LINES:
                said, left = now, format_duration((count - done) / rate)
                print(f"{title} {done}/{count}, {rate:,.3g}/s, {left} left", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _nobody_may_listen() -> Iterator[None]:
    """A pipe that the launcher's death has broken must not keep a run from saving (rich exits where it finds one)."""
    with contextlib.suppress(OSError, SystemExit):
        yield


def format_duration(seconds: float) -> str:
    """`3d 04h`, `2h 05m`, `3m 07s` or `12s`."""
    whole = int(max(seconds, 0))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
