"""What the tools that look at trained weights take: a run folder, a checkpoint, or an official folder."""

from __future__ import annotations

from pathlib import Path

from nepa_scale.config import Config, config_from_dict
from nepa_scale.interop.official import CONFIG, load_official
from nepa_scale.objectives import Classifier, NextEmbedding, is_causal
from nepa_scale.training.checkpoint import locate_checkpoint, read_meta
from nepa_scale.training.export import load_task


def load_any(path: Path, weights: str | None) -> tuple[NextEmbedding | Classifier, Config | None, str]:
    """The module in eval mode on the host, the configuration of its run, and which of its weights were taken.

    weights: "raw" or "ema"; None: the moving average, where there is one. An official folder has one kind, "official",
        and no configuration.
    Raises:
        ConfigError: neither is there, or not with these weights.
    """
    if (path / CONFIG).is_file():
        return load_official(path).task, None, "official"
    folder = locate_checkpoint(path)
    config = config_from_dict(read_meta(folder)["config"], str(folder))
    weights = weights or ("ema" if config.ema.decay > 0 else "raw")
    return load_task(folder, weights), config, weights


def attends_causally(task: NextEmbedding | Classifier) -> bool:
    """Whether the backbone was trained, and is therefore to be judged, with causal attention."""
    return task.causal if isinstance(task, Classifier) else is_causal(task.objective)
