"""What becomes of steps that were skipped: they are reported, and too many in a row end this stretch of training."""

from __future__ import annotations

import dataclasses

from nepa_scale.training.checkpoint import Checkpointer
from nepa_scale.training.metrics import BadStep
from nepa_scale.training.progress import TerminalProgress
from nepa_scale.training.run_folder import JsonLines

SKIPPED_STEPS = "skipped_steps.jsonl"
_NAMED = 8  # samples in a line for people; the file has all


class TrainingFailure(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is good."""


class TooManySkipped(TrainingFailure):
    """`train.max_skipped` steps in a row, of which `first` was the first, were skipped; `step` is the present one."""

    def __init__(self, message: str, first: int, step: int) -> None:
        super().__init__(message)
        self.first, self.step = first, step


class SkipLog:
    """Reports the steps that were skipped and stops a run that skips too many in a row; the same on every rank.

    log: where each is written; the main rank's
    """

    def __init__(self, limit: int, log: JsonLines | None) -> None:
        self.limit, self._log = limit, log
        self._first, self._last = -1, -1

    def check(self, bad: list[BadStep], step: int, checkpointer: Checkpointer, progress: TerminalProgress) -> None:
        """bad: the steps of the window that ends at `step`. Raises TooManySkipped."""
        for found in bad:
            if found.step != self._last + 1:
                self._first = found.step
            self._last = found.step
            if self._log is not None:
                self._log.write(dataclasses.asdict(found))
            more = " ..." if len(found.keys) > _NAMED else ""
            said = f"{found.why}; samples {' '.join(found.keys[:_NAMED])}{more}"
            progress.say(f"step {found.step} was skipped: {said}")
            count = found.step - self._first + 1
            if count >= self.limit:
                raise TooManySkipped(
                    f"{count} steps in a row up to step {found.step} were skipped ({said}); the last checkpoint is "
                    f"{checkpointer.latest() or 'none'}. Lower optimizer.base_lr, look at the samples, or set "
                    "train.on_bad_steps=rewind",
                    self._first,
                    step,
                )
