"""Ends this process at once, whatever its main thread is doing, and still leaves things as they should be left.

So does every program of several ranks when it is done, in place of sys.exit: process groups outlive their destruction
where FSDP2 or DeepSpeed still know them, and a gloo thread that lets go of its last tensor while the interpreter is
taken down aborts the process, which a launcher then takes for a failed run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

EXIT_FAILURE = 1
_duties: list[Callable[[int], None]] = []
_leaving = threading.Lock()


def on_departure(duty: Callable[[int], None]) -> None:
    """Has `depart` call `duty(exit code)`; it must be quick, and safe while the main thread is anywhere."""
    _duties.append(duty)


def depart(code: int) -> NoReturn:
    """Does the duties and ends the process, without unwinding its threads: one of them may never come back."""
    with _leaving:
        for duty in reversed(_duties):
            with contextlib.suppress(Exception):
                duty(code)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
