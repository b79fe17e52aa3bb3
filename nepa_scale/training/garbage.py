"""When Python looks for garbage: between steps, on all ranks alike.

Left alone, it looks in the midst of some rank's step, and all others wait for that one at their next collective.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 1  # generations that a look between steps covers; what is older lives as long as the run


@contextmanager
def garbage_on_request() -> Iterator[None]:
    """Within the context garbage is collected only by `collect_garbage`; what lives already is never looked at."""
    gc.collect()
    gc.freeze()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect_garbage() -> None:
    gc.collect(YOUNG)
