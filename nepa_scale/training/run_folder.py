"""What a run leaves on disk beside its checkpoints, and whose run a folder is."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from nepa_scale.config import Config, ConfigError, config_from_dict, flatten, to_dict
from nepa_scale.training.versions import package_version

PACKAGES = ("nepa_scale", "torch", "deepspeed", "webdataset", "timm")  # whose versions a run records
# what makes two runs the same run; anything else may change on resuming
IDENTITY = (
    "task",
    "model.",
    "objective.",
    "finetune.pooling",
    "finetune.causal",
    "train.seed",
    "train.global_batch_size",
)
# what can bear neither on a run's results nor on what its record says of them; all else is a setting, whose change is
# recorded (`run_record`)
NO_SETTINGS = (
    "output",
    "tracker",
    "train.resume",
    "train.timeout",
    "data.workers",  # samples and their crops do not depend on who reads them
    "data.timeout",
    "data.retries",
    "data.cache",
    "data.allow_pipe",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.stop_on_failure",
    "evaluate.batch_size",
)


def require_same_run(saved: dict[str, Any], config: Config, where: str) -> None:
    """Compares the identity of a saved configuration with that of `config`.

    Raises:
        ConfigError: they differ; all differences are named.
    """
    old, new = (flatten(to_dict(c)) for c in (config_from_dict(saved, where), config))
    differences = [
        f"{key} was {old[key]}, now it is {value}"
        for key, value in new.items()
        if key.startswith(IDENTITY) and old[key] != value
    ]
    if differences:
        raise ConfigError(
            f"{where} belongs to another run: {'; '.join(differences)}; "
            f"set {'it' if len(differences) == 1 else 'them'} back, or choose another folder with output=..."
        )


def prepare_run_folder(run: Path, config: Config) -> None:
    """Creates the folder and, at a run's first start, its `config.yaml`, which no later start changes.

    Called by the main rank only.

    Raises:
        ConfigError: the folder cannot be written, holds another run, or holds this one and train.resume=none.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigError(
            f"cannot write the run folder {run}: {error.strerror}; choose another with output="
        ) from error
    path = run / "config.yaml"
    if path.exists():
        saved = yaml.safe_load(path.read_text()) or {}
        saved.pop("provenance", None)
        require_same_run(saved, config, str(run))
        if config.train.resume == "none" and (run / "metrics.jsonl").exists():
            raise ConfigError(
                f"{run} already holds this run and train.resume=none asks for a fresh one: remove the folder, choose "
                "another with output=..., or let train.resume=auto go on with it"
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config) | {"provenance": provenance()}, sort_keys=False))
    temporary.replace(path)


def provenance() -> dict[str, Any]:
    """Where the run's numbers come from: versions, commit, command, host, time."""
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class JsonLines:
    """A file of one JSON object a line, each on disk as soon as it is written; a torn last line is tolerated."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a `JsonLines` file, without a torn last one; empty where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def forget_after(path: Path, step: int) -> None:
    """Removes the rows of steps after `step`, which a resumed run is about to write again."""
    if not path.exists():
        return
    rows = [row for row in read_json_lines(path) if row.get("step", 0) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
