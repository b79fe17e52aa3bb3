"""What a sharded module starts from: initial values, or a pretrained backbone from wherever it was kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nepa_scale.config import ConfigError, ModelConfig, config_from_dict, flatten
from nepa_scale.interop.official import CONFIG, load_official, weights_by_default
from nepa_scale.models import Architecture, initial_values, resolve_architecture
from nepa_scale.sharding import Shard
from nepa_scale.training.checkpoint import load_shards, locate_checkpoint, read_meta
from nepa_scale.training.checkpoint_format import read_index
from nepa_scale.training.weights import choose_weights

PREFIX = "backbone."
# what may differ between pretraining and fine-tuning, as it belongs to no weight
_FREE = {"image_size", "drop_path", "rope_rescale", "init_std", "mask_token", "base_width", "base_depth"}


def initialize_shards(shards: list[Shard], architecture: Architecture, seed: int) -> None:
    """Writes this rank's part of the masters' initial values."""
    for shard in shards:
        if shard.stop > shard.start:
            values = initial_values(shard.name, shard.shape, architecture, seed).flatten()
            shard.tensors["master"].copy_(values[shard.start : shard.stop])


def load_backbone(source: str, shards: list[Shard], model: ModelConfig, *, average: bool | None) -> str:
    """Fills the masters of all parameters named `backbone.*`; the others stay as they are. Collective.

    Returns where they are from, and which weights they were, for people.

    source: a checkpoint or run folder of pretraining, or a folder in the official layout
    average: take the moving average of the weights, or those as trained; None: by default (`weights`). Of an
        official folder, whose trainer need not have left an average: the average, where there is one, unless False
    Raises:
        ConfigError: nothing usable is there, or no average that is asked for, or its architecture is another; the first
            difference is named. QK-norm without weights may become one with weights, which starts as the same function;
            nothing else is filled in.
    """
    mine = [shard for shard in shards if shard.name.startswith(PREFIX)]
    wanted = resolve_architecture(model)
    if (Path(source) / CONFIG).is_file():
        kind = "raw" if average is False else weights_by_default(Path(source))
        official = load_official(source, kind)
        _require_same(official.task.backbone.architecture, wanted, source)
        weights = dict(official.task.named_parameters())
        for shard in mine:
            if shard.name in weights and shard.stop > shard.start:
                shard.tensors["master"].copy_(weights[shard.name].detach().flatten()[shard.start : shard.stop])
        return f"{source} (official {kind} weights)"
    folder = locate_checkpoint(source)
    saved = config_from_dict(read_meta(folder)["config"], str(folder))
    _require_same(resolve_architecture(saved.model), wanted, str(folder))
    chosen = choose_weights(folder, None if average is None else "ema" if average else "raw")
    kind = chosen.kind
    held = read_index(folder).shapes
    read = [_reading(shard, kind) for shard in mine if shard.name in held]
    passed_over = [
        Shard(name, shape, 0, 0, {kind: torch.empty(0)}) for name, shape in held.items() if not _of_backbone(name)
    ]
    load_shards(folder, [*read, *passed_over])
    return f"{folder} ({chosen})" + (f": {chosen.note}" if chosen.note else "")


def _reading(shard: Shard, kind: str) -> Shard:
    """A shard through which `kind` is read into the master."""
    return dataclasses.replace(shard, tensors={kind: shard.tensors["master"]})


def _of_backbone(name: str) -> bool:
    return name.startswith(PREFIX) and "mask_token" not in name


def _require_same(found: Architecture, wanted: Architecture, where: str) -> None:
    theirs, ours = (flatten(dataclasses.asdict(a)) for a in (found, wanted))
    for field, value in ours.items():
        if field in _FREE or theirs[field] == value:
            continue
        if field == "qk_norm" and (theirs[field], value) == ("plain", "affine"):
            continue
        raise ConfigError(f"{where} holds a backbone with {field}={theirs[field]}, but the run asks for {value}")
