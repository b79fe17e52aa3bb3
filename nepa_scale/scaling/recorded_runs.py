"""What run folders say, as the report shows it; a run may be unfinished, torn, or have failed before its first step."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nepa_scale.config import Config, ConfigError, ModelConfig
from nepa_scale.models import SIZES, resolve_architecture, size_name
from nepa_scale.scaling.sweep import LOG
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.run_folder import read_json_lines
from nepa_scale.training.run_record import Change, RunRecord

Row = dict[str, Any]

COLLAPSED_COSINE, COLLAPSED_RANK = 0.95, 2.0
_MARKS = ("config.yaml", "metrics.jsonl", LOG)  # a folder that holds one of them is a run, or was to become one
_ENDED_BADLY = re.compile(r"^(error\b|[\w.]*(Error|Exception|Interrupt)\b|Killed|Segmentation fault)", re.IGNORECASE)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_LINE = 400  # characters of a log's last line


@dataclass(frozen=True)
class RecordedRun:
    """One run folder.

    size: of the model, for people, and its objective where that is not next_embedding
    parameters: trainable (of fine-tuning: the backbone's); None where the configuration does not say
    status: finished | unfinished | failed
    share: of the planned steps that were made, 0..1; None where the plan is not known
    said: what there is to know of a failure, or the last line of a run that has not finished
    config: that the last steps were trained with; None where it cannot be read
    rows: of metrics.jsonl, one for each step, with `samples_seen` and `flops_seen` where they can be known
    provenance: of the first start
    skipped_steps, bad_samples: counts
    record: all its starts, and what each of its steps was trained with; None where config is
    """

    name: str
    folder: Path
    size: str
    parameters: int | None
    status: str
    share: float | None
    said: str
    config: Config | None
    rows: list[Row]
    provenance: dict[str, Any]
    skipped_steps: int
    bad_samples: int
    record: RunRecord | None = None

    @property
    def changes(self) -> list[Change]:
        """Of its settings, between one step and the next."""
        return self.record.changes() if self.record else []

    @property
    def mixed(self) -> str:
        """How what bears on learning changed under way, so that the result is of no one recipe; empty where nothing
        did."""
        return self.record.mixed() if self.record else ""

    @property
    def objective(self) -> str:
        """That of pretraining; empty where the run is none, or does not say."""
        return self.config.objective.name if self.config and self.config.task == "pretrain" else ""

    def values(self, key: str) -> list[float]:
        """The finite numbers logged as `key`, in order."""
        return [row[key] for row in self.rows if is_number(row.get(key))]

    def last(self, key: str) -> float | None:
        found = self.values(key)
        return found[-1] if found else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def collapse(run: RecordedRun) -> str:
    """Why the run's targets are taken for collapsed; empty where they are not."""
    cosine, rank = run.last("target_cosine"), run.last("effective_rank")
    if cosine is not None and cosine > COLLAPSED_COSINE:
        return f"different targets have a cosine of {cosine:.3f}"
    if rank is not None and rank < COLLAPSED_RANK:
        return f"the targets' effective rank is {rank:.2f}"
    return ""


def read_recorded_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """The runs that `paths` are, or hold directly (the output folder of a sweep), the smallest model first.

    Raises:
        ConfigError: a path is no folder, or neither a run nor a folder of runs.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _run_folders(path)))
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    return sorted(runs, key=lambda run: (run.parameters or math.inf, run.last("flops_seen") or 0.0, run.name))


def _run_folders(path: Path) -> list[Path]:
    path = Path(os.path.abspath(path))  # `.` has a name, too
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder: give run folders, or the output folder of a sweep")
    if _is_run(path):
        return [path]
    found = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    if not found:
        raise ConfigError(f"{path} is not a run folder, and holds none: no config.yaml or metrics.jsonl is there")
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as much of the path before them as tells them apart."""
    names = [folder.name for folder in folders]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        count = Counter(names)
        names = [
            name if count[name] == 1 else "/".join(folder.parts[-depth:])
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def _read(folder: Path, name: str) -> RecordedRun:
    record, problem = _record(folder)
    config = record.config if record else None
    rows = _rows(folder, config)
    share = _share(config, rows)
    complete = share is not None and share >= 1
    failure = problem or _failure(folder) or ("" if complete else _bad_end(folder))
    status = "failed" if failure else "finished" if complete else "unfinished"
    return RecordedRun(
        name=name,
        folder=folder,
        size=_size(config) if config else "",
        parameters=_parameters(config) if config else None,
        status=status,
        share=share,
        said=failure or ("" if complete else _last_line(folder)),
        config=config,
        rows=rows,
        provenance=record.provenance if record else {},
        skipped_steps=len(read_json_lines(folder / "skipped_steps.jsonl")),
        bad_samples=len(read_json_lines(folder / "bad_samples.jsonl")),
        record=record,
    )


def _record(folder: Path) -> tuple[RunRecord | None, str]:
    """What a run says of itself, or what is wrong with that if it cannot be read."""
    try:
        record = RunRecord.read(folder)
        record.segments()  # every start's settings, read
        return record, ""
    except FileNotFoundError:
        return None, _last_line(folder) or "it ended before it wrote its configuration"
    except (OSError, ConfigError) as error:
        return None, f"config.yaml cannot be read: {' '.join(str(error).split())}"


def _rows(folder: Path, config: Config | None) -> list[Row]:
    """One row a step: evaluations, which log no more than their step, are joined to it and get its counts."""
    joined: dict[int, Row] = {}
    for row in read_json_lines(folder / "metrics.jsonl"):
        if isinstance(row, dict) and is_number(row.get("step")):  # a torn line may read as a number
            joined.setdefault(row["step"], {}).update(row)
    rows = [joined[step] for step in sorted(joined)]
    counted = [row for row in rows if row["step"] and is_number(row.get("samples_seen"))]
    per_step = {key: counted[-1].get(key, 0) / counted[-1]["step"] for key in _COUNTS} if counted else {}
    if not counted and config is not None:
        per_step = {"samples_seen": config.train.global_batch_size}
    for row in rows:
        for key, each in per_step.items():
            row.setdefault(key, row["step"] * each)
    return rows


_COUNTS = ("samples_seen", "flops_seen")


def _share(config: Config | None, rows: list[Row]) -> float | None:
    if config is None or not rows:
        return None
    done = rows[-1]["step"]
    if config.train.steps:
        return float(done / config.train.steps)
    steps_per_epoch = [row["step"] / row["epoch"] for row in rows if row["step"] and is_number(row.get("epoch"))]
    if not steps_per_epoch or not config.train.epochs:
        return None
    return float(done / max(1, round(config.train.epochs * round(steps_per_epoch[-1]))))


def _size(config: Config) -> str:
    """Its name where it is a named size, else its width and depth (and heads or MLP, if only they are its own)."""
    model, objective = config.model, config.objective.name
    other = objective if objective != "next_embedding" else ""
    return " ".join(filter(None, [_shape(model), f"p{model.patch_size}", other]))


def _shape(model: ModelConfig) -> str:
    try:
        architecture = resolve_architecture(model)
    except ConfigError:  # sizes that this version does not know
        return model.size
    if (name := size_name(architecture)) in SIZES:
        return name
    size = SIZES[model.size]
    shape = f"w{architecture.width} d{architecture.depth}"
    if (size.width, size.depth) != (architecture.width, architecture.depth):
        return shape
    return f"{shape} h{architecture.heads} m{architecture.mlp_width}"


def _parameters(config: Config) -> int | None:
    try:
        return Pretraining(config).parameters
    except ConfigError:
        return None


def _failure(folder: Path) -> str:
    """What the ranks told each other when one of them failed; empty where none did since the last start."""
    try:
        text = str(json.loads((folder / "ranks" / "failure.json").read_text())["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    lines = [_clean(line) for line in text.splitlines() if line.strip()]
    where = lines[0].removesuffix("Traceback (most recent call last):") if len(lines) > 1 else ""
    return f"{where}{lines[-1]}"[:_LINE] if lines else ""


def _bad_end(folder: Path) -> str:
    """The log's last line if it is an error's."""
    line = _last_line(folder)
    return line if _ENDED_BADLY.match(line) else ""


def _last_line(folder: Path) -> str:
    """Of what the run printed, if a sweep kept it."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, (folder / LOG).stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_clean(line) for line in re.split(r"[\r\n]+", text)]
    return next((line[:_LINE] for line in reversed(lines) if line), "")


def _clean(text: str) -> str:
    return _CONTROL.sub("", text).strip()
