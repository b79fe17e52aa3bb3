"""What the tools that look at trained weights take: a run folder, a checkpoint, or an official folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nepa_scale.config import Config, config_from_dict
from nepa_scale.interop.official import CONFIG, has_average, load_official, weights_by_default
from nepa_scale.objectives import Classifier, NextEmbedding, is_causal
from nepa_scale.training.checkpoint import locate_checkpoint, read_meta
from nepa_scale.training.export import load_task
from nepa_scale.training.exported import class_names
from nepa_scale.training.run_record import describe_changes, record_of_checkpoint
from nepa_scale.training.weights import choose_weights


@dataclass(frozen=True)
class Loaded:
    """
    path: as it was given
    task: the module in eval mode, on the host
    config: of its run; None of an official folder
    weights: "raw" or "ema"; "official" of an official folder that has one kind only
    step: of the checkpoint
    changed: which of the run's settings changed on the way to it, and where; empty: none did
    note: a line for people, where the default is not the average that there is
    class_names: of a classifier, by label, where they are known
    """

    path: Path
    task: NextEmbedding | Classifier
    config: Config | None
    weights: str
    step: int | None
    changed: str
    note: str
    class_names: list[str] | None

    @property
    def facts(self) -> dict[str, Any]:
        """`checkpoint`, `weights` and `step`, and `settings_changed` where some did, for JSON."""
        found: dict[str, Any] = {"checkpoint": str(self.path), "weights": self.weights, "step": self.step}
        return found | ({"settings_changed": self.changed} if self.changed else {})


def load_any(path: Path, weights: str | None) -> Loaded:
    """What lies at `path`.

    weights: "raw" or "ema"; None: by the rule of `training.weights`, and of an official folder the average, if any
    Raises:
        ConfigError: neither is there, or not with these weights.
    """
    if (path / CONFIG).is_file():
        kind = weights or weights_by_default(path)
        named = kind if has_average(path) else "official"
        official = load_official(path, kind)
        return Loaded(path, official.task, None, named, None, "", "", official.class_names)
    folder = locate_checkpoint(path)
    chosen = choose_weights(folder, weights)
    meta, record = read_meta(folder), record_of_checkpoint(folder)
    config = config_from_dict(meta["config"], str(folder))
    changed = describe_changes(record.changes(chosen.step, meta.get("start"))) if record else ""
    task = load_task(folder, chosen.weights)
    return Loaded(path, task, config, chosen.weights, chosen.step, changed, chosen.note, class_names(folder))


def source_of(facts: dict[str, Any]) -> str:
    """What a tool's facts are of, for people: "runs/demo, step 600 (ema weights)"."""
    step = "" if facts["step"] is None else f", step {facts['step']:,}"
    changed = f"; its {facts['settings_changed']}" if facts.get("settings_changed") else ""
    return f"{facts['checkpoint']}{step} ({facts['weights']} weights{changed})"


def attends_causally(task: NextEmbedding | Classifier) -> bool:
    """Whether the backbone was trained, and is therefore to be judged, with causal attention."""
    return task.causal if isinstance(task, Classifier) else is_causal(task.objective)
