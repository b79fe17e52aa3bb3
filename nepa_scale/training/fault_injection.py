"""Kills this process at a named point of a save, so that tests and trials can show what survives.

    NEPA_FAULT=POINT[:NTH[:RANK]]     e.g. commit-renamed, part-half:2, part-synced:1:3

SIGKILL is sent when POINT is reached for the NTH time (default 1) on RANK (default: whichever ranks reach it).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "NEPA_FAULT"
FAULT_POINTS = (
    "save-begun",  # nothing copied yet
    "save-copied",  # the state is in host memory
    "part-created",  # every rank: an empty part file
    "part-half",
    "part-written",  # all of it handed to the system, nothing asked to be on disk
    "part-synced",
    "commit-agreed",  # from here on rank 0 alone
    "commit-meta",
    "commit-index",
    "commit-synced",  # complete, but still under its temporary name
    "commit-replacing",  # only where the step had been saved before: the old folder is aside, the new one not in place
    "commit-renamed",  # visible, `latest` still names the previous one
    "commit-latest",
    "retention-hidden",  # an expired checkpoint is renamed, not yet deleted
    "retention-done",
)

_reached: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Dies here if `NEPA_FAULT` says so."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, nth, rank = (*wanted.split(":"), "", "")[:3]
    if point != name or (rank and rank != os.environ.get("RANK", "0")):
        return
    _reached[name] += 1
    if _reached[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
