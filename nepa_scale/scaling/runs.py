"""The runs that laws are fitted to: rows of a CSV file, or run folders."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from nepa_scale.config import ConfigError, config_from_dict, nearest
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.run_folder import read_json_lines


@dataclass(frozen=True)
class Columns:
    """What is fitted, row by row; `flops` is None where the data have none."""

    parameters: list[float]
    samples: list[float]
    loss: list[float]
    flops: list[float] | None


def read_csv(path: Path, parameters: str, samples: str, loss: str, flops: str | None) -> Columns:
    """The named columns of a file with a header.

    Raises:
        ConfigError: it cannot be read, a column is missing, or a cell is not a number (row and column are named).
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not rows:
        raise ConfigError(f"{path} holds no rows below its header")
    wanted = {"parameters": parameters, "samples": samples, "loss": loss} | ({"flops": flops} if flops else {})
    for option, name in wanted.items():
        if name not in rows[0]:
            found = [key for key in rows[0] if key]
            raise ConfigError(
                f"{path} has no column '{name}'{nearest(name, found)}: name one with --{option} ({', '.join(found)})"
            )
    columns = {
        option: [_number(row[name], path, at, name) for at, row in enumerate(rows)] for option, name in wanted.items()
    }
    return Columns(columns["parameters"], columns["samples"], columns["loss"], columns.get("flops"))


def read_runs(folders: list[Path], metric: str) -> Columns:
    """Size, samples, FLOPs and the last value of `metric` of run folders.

    Raises:
        ConfigError: a folder is no run, or its metrics never have `metric`.
    """
    columns = Columns([], [], [], [])
    for folder in folders:
        try:
            values = yaml.safe_load((folder / "config.yaml").read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{folder} is not a run folder: {error}") from error
        values.pop("provenance", None)
        rows = read_json_lines(folder / "metrics.jsonl")
        measured = [row for row in rows if row.get(metric) is not None]
        seen = [row for row in rows if "samples_seen" in row]
        if not measured or not seen:
            raise ConfigError(
                f"the metrics of {folder} have no '{metric}'{nearest(metric, sorted({*(), *_keys(rows)}))}"
            )
        columns.parameters.append(float(Pretraining(config_from_dict(values, str(folder))).parameters))
        columns.samples.append(float(seen[-1]["samples_seen"]))
        columns.loss.append(float(measured[-1][metric]))
        assert columns.flops is not None
        columns.flops.append(float(seen[-1]["flops_seen"]))
    return columns


def _keys(rows: list[dict[str, object]]) -> set[str]:
    return {key for row in rows for key in row}


def _number(cell: str | None, path: Path, row: int, column: str) -> float:
    try:
        return float(cell or "")
    except ValueError:
        raise ConfigError(f"{path}, row {row + 1}: {column} is '{cell or ''}', not a number") from None
