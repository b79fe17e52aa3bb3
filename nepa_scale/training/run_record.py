"""What a run's steps were trained with: the one place that knows how its folder says so.

`RUN/config.yaml` is written by the first start and never again. Each start, the first included, adds a line to
`RUN/starts.jsonl` once it knows from which step it goes on. Its settings are those of config.yaml with the line's
`overrides` over them; `changed` compares them with what the steps up to there were trained with. A checkpoint says
which start wrote it, and a start goes on from the start that wrote its checkpoint (`after`). So steps that were made
and lost again (killed before they were saved, or left by going back) are no part of what the weights came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from nepa_scale.config import Config, ConfigError, config_from_dict, flatten, to_dict
from nepa_scale.training.run_folder import IDENTITY, NO_SETTINGS, provenance, read_json_lines

STARTS = "starts.jsonl"
STRATEGY = "strategy"  # of changes: the one that is resolved, not what was asked for ("auto")

# Settings that change what is measured, or how fast and in how much memory steps are computed, but not what is learnt:
# the strategies agree within rounding (docs/parity.md), as do recomputation, compilation and micro-batches
NOT_LEARNT = (
    "checkpoint.",
    "evaluate.",
    "data.val",
    "data.max_bad_fraction",
    "train.log_",
    "train.micro_batch_size",
    "activation_",
    "compile",
    STRATEGY,
)


@dataclass(frozen=True)
class Change:
    """A setting that is `new` after step `step`, and was `old` up to it."""

    key: str
    old: Any
    new: Any
    step: int = 0

    @property
    def learnt(self) -> bool:
        """Whether it bears on what the weights become."""
        return not self.key.startswith(NOT_LEARNT)

    @property
    def identity(self) -> bool:
        """Whether it makes the run another run."""
        return self.key.startswith(IDENTITY)

    def __str__(self) -> str:
        return f"{self.key} {shown(self.old)} -> {shown(self.new)}"


@dataclass(frozen=True)
class Start:
    """A line of starts.jsonl.

    number: from 1; the run's checkpoints name it
    step: that it goes on from
    after: the number of the start that trained up to there; None: there is none, or it is not of this folder
    facts: the whole line
    """

    number: int
    step: int
    after: int | None
    strategy: str
    changed: tuple[Change, ...]
    overrides: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """Steps `first` to `last` were trained by one start.

    start: None for steps from elsewhere (another run's checkpoint), or from before starts were recorded
    strategy: None where it is not known
    """

    first: int
    last: int
    config: Config
    strategy: str | None
    start: Start | None


@dataclass(frozen=True)
class RunRecord:
    """
    first: the configuration of the first start
    provenance: of the first start
    starts: in order
    reached: the last step that was logged or gone on from
    """

    first: Config
    provenance: dict[str, Any]
    starts: list[Start]
    reached: int

    @staticmethod
    def read(folder: Path) -> RunRecord:
        """
        Raises:
            FileNotFoundError: the folder has no config.yaml.
            ConfigError: it cannot be read.
        """
        first, origin = read_first_config(folder)
        starts = [start for line in read_json_lines(folder / STARTS) if (start := _start(line)) is not None]
        steps = [
            row["step"]
            for row in read_json_lines(folder / "metrics.jsonl")
            if isinstance(row, dict) and isinstance(row.get("step"), int)
        ]
        return RunRecord(first, origin, starts, max([*steps, *(start.step for start in starts[-1:])], default=0))

    def config_of(self, start: Start | None) -> Config:
        return self.first if start is None else _overridden(self.first, start.overrides)

    @property
    def config(self) -> Config:
        """That of the last steps; of a run without any, of its last start."""
        segments = self.segments()
        return segments[-1].config if segments else self.config_of(self.starts[-1] if self.starts else None)

    def segments(self, last: int | None = None, start: int | None = None) -> list[Segment]:
        """What the steps up to `last` were trained with, in order.

        last: default: as far as the run has got
        start: the number of the start that made step `last`, as its checkpoint says; default: the last one
        """
        end = self.reached if last is None else last
        by_number = {one.number: one for one in self.starts}
        one = by_number.get(start or 0) or (self.starts[-1] if self.starts else None)
        if one is None:
            return [Segment(1, end, self.first, None, None)] if end > 0 else []
        found: list[Segment] = []
        while True:
            config = self.config_of(one)
            if one.step < end:
                found.append(Segment(one.step + 1, end, config, one.strategy, one))
                end = one.step
            if one.after not in by_number:
                break
            one = by_number[one.after]
        if end > 0 and one.step > 0:  # from elsewhere: all that is known of it is what the first start changed
            before = {change.key: change.old for change in one.changed}
            strategy = before.pop(STRATEGY, one.strategy)
            found.append(Segment(1, end, _overridden(config, before), strategy, None))
        return found[::-1]

    def changes(self, last: int | None = None, start: int | None = None) -> list[Change]:
        """Where one step was trained with other settings than the one before; arguments as of `segments`."""
        segments = self.segments(last, start)
        return [
            change
            for before, after in pairwise(segments)
            for change in changes_between(
                before.config, after.config, (before.strategy, after.strategy), step=before.last
            )
        ]

    def mixed(self) -> str:
        """How what bears on learning changed under way, so that the result is of no one recipe; empty where nothing
        did."""
        return describe_changes([change for change in self.changes() if change.learnt])


def describe_changes(changes: Sequence[Change]) -> str:
    """`settings changed at step 6: optimizer.lr 0.001 -> 0.002`; empty where none did."""
    steps = dict.fromkeys(change.step for change in changes)
    each = [f"at step {step}: {', '.join(str(one) for one in changes if one.step == step)}" for step in steps]
    return f"settings changed {'; '.join(each)}" if each else ""


def record_in(folder: Path) -> RunRecord | None:
    """Of the run in the folder; None where it is none, or does not say."""
    try:
        return RunRecord.read(folder)
    except (FileNotFoundError, ConfigError):
        return None


def record_of_checkpoint(checkpoint: Path) -> RunRecord | None:
    """Of the run that a checkpoint lies in; None where it was taken out of it, or the run does not say."""
    return record_in(checkpoint.resolve().parent.parent)


def read_first_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """What config.yaml says: the first start's configuration and provenance.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be read: it holds no configuration")
    origin = values.pop("provenance", None)
    return config_from_dict(values, str(path)), origin if isinstance(origin, dict) else {}


def changes_between(
    old: Config, new: Config, strategies: tuple[str | None, str | None] = (None, None), step: int = 0
) -> list[Change]:
    """Settings in which two configurations differ.

    strategies: old and new, as resolved; None: not known, or not asked for, and then no difference
    """
    before, after = settings(old), settings(new)
    found = [Change(key, before[key], value, step) for key, value in after.items() if before[key] != value]
    if None not in strategies and strategies[0] != strategies[1]:
        found.append(Change(STRATEGY, *strategies, step))
    return found


def settings(config: Config) -> dict[str, Any]:
    """The keys of a configuration that can bear on a run's results or its record, but for the strategy asked for."""
    flat = flatten(to_dict(config))
    return {key: value for key, value in flat.items() if key != STRATEGY and not key.startswith(NO_SETTINGS)}


def append_start(
    folder: Path,
    config: Config,
    *,
    strategy: str,
    step: int,
    after: int | None,
    checkpoint: Path | None,
    changed: Sequence[Change],
) -> int:
    """Adds this program's start to the run's record; returns its number.

    after, checkpoint: what it goes on from, where there is something
    """
    record = RunRecord.read(folder)
    first = flatten(to_dict(record.first))
    number = max((start.number for start in record.starts), default=0) + 1
    facts = provenance()
    line = {
        "start": number,
        "time": facts.pop("started"),
        "step": step,
        "strategy": strategy,
        **facts,
        "after": after,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "changed": {change.key: [change.old, change.new] for change in changed},
        "overrides": {key: value for key, value in flatten(to_dict(config)).items() if first[key] != value},
    }
    _append(folder / STARTS, json.dumps(line))
    return number


def _append(path: Path, line: str) -> None:
    """Adds a line, on the disk when this returns; a line that a crash tore is ended first."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _start(line: Any) -> Start | None:
    """None for what is no line of ours."""
    try:
        changed = tuple(Change(key, old, new, line["step"]) for key, (old, new) in line["changed"].items())
        return Start(
            number=line["start"],
            step=line["step"],
            after=line["after"],
            strategy=line["strategy"],
            changed=changed,
            overrides=line["overrides"],
            facts=line,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _overridden(config: Config, overrides: dict[str, Any]) -> Config:
    values = to_dict(config)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    return config_from_dict(values, STARTS)


def shown(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
