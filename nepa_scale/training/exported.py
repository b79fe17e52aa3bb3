"""What goes with exported weights: which run they are of, and the names of its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nepa_scale.config import ConfigError, DataConfig, config_from_dict
from nepa_scale.data.remote import Remote, RemoteError, is_remote
from nepa_scale.data.sources import resolve
from nepa_scale.training.checkpoint import read_meta

ORIGIN = "export.json"  # beside the weights of a folder; a safetensors file has its metadata
_WEIGHTS = ("model.safetensors", "config.json")


def run_of(checkpoint: Path) -> str:
    """The run folder of a checkpoint, by which the exports of runs are told apart."""
    return str(checkpoint.resolve().parent.parent)


def require_own_file(output: Path, run: str) -> None:
    """Raises ConfigError where the file is there and is not an export of `run`."""
    if not output.exists():
        return
    try:
        with safe_open(output, "pt") as file:
            owner = (file.metadata() or {}).get("run")
    except (OSError, SafetensorError):
        owner = None
    _require(output, owner, run)


def require_own_folder(output: Path, run: str, layout: str) -> None:
    """Raises ConfigError where the folder holds weights that are not an export of `run` in this layout."""
    if not any((output / name).exists() for name in _WEIGHTS):
        return
    origin = read_origin(output)
    _require(output, origin.get("run"), run)
    if origin["to"] != layout:
        raise ConfigError(f"{output} holds this run in the layout {origin['to']}: name another folder for {layout}")


def _require(output: Path, owner: str | None, run: str) -> None:
    if owner != run:
        held = f"the export of {owner}" if owner else "weights that are no export of a run"
        raise ConfigError(f"{output} holds {held}, which {run} would overwrite: name another output, or remove it")


def read_origin(folder: Path) -> dict[str, Any]:
    """What `write_origin` wrote; empty where there is nothing, or nothing readable."""
    try:
        origin = json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) and "to" in origin else {}


def write_origin(folder: Path, facts: dict[str, Any]) -> None:
    """facts: run, checkpoint, step, weights, to"""
    (folder / ORIGIN).write_text(json.dumps(facts, indent=2) + "\n")


def class_names(checkpoint: Path) -> list[str] | None:
    """The names of a fine-tuned checkpoint's classes, by label: its own; else those of the shards that it was trained
    on, where they are still there on this machine; None where neither names them."""
    meta = read_meta(checkpoint)
    config = config_from_dict(meta["config"], str(checkpoint))
    if config.task != "finetune":
        return None
    if meta.get("class_names") is not None:
        return list(meta["class_names"])
    source = str(config.data.train)
    if any(map(is_remote, source.split("::"))):
        return None
    try:
        return resolve(source, Remote.from_config(DataConfig())).class_names
    except (ConfigError, RemoteError):
        return None
