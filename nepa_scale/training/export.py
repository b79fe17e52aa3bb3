"""Weights out of a checkpoint, on one process, whatever strategy and number of ranks wrote it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nepa_scale.config import ConfigError, config_from_dict
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier, NextEmbedding
from nepa_scale.objectives.pretext import PRETRAINING_ONLY, encoding
from nepa_scale.sharding.shard import Shard
from nepa_scale.training.checkpoint import load_shards, locate_checkpoint, read_meta
from nepa_scale.training.checkpoint_format import Index
from nepa_scale.training.exported import class_names, require_own_file, run_of
from nepa_scale.training.part_files import BLOCK_BYTES, FLOAT_BYTES, Corrupt, PartReader, safetensors_header
from nepa_scale.training.weights import Choice, choose_weights, index_of


def export_safetensors(
    checkpoint: str | Path,
    output: Path,
    weights: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the whole weights as one safetensors file: float32, by parameter name, metadata "weights", "step", "run"
    (its folder) and, of a classifier whose classes have names, "class_names" (a JSON list, by label).

    Parts are read one after the other and each range goes straight to its place in the file, so that this takes the
    memory of one block (4 MiB), however large the model.

    checkpoint: a step_N folder, or a run folder whose newest is meant
    weights: "raw" or "ema"; None: by the default rule, see `weights`
    progress: told the bytes done and those in all
    Returns what was written: checkpoint, step, weights, parameters, bytes, output.
    Raises:
        ConfigError: no checkpoint, no such weights in it, damage, an output that cannot be written, or one that holds
            something else than an export of this run.
    """
    folder = locate_checkpoint(checkpoint)
    chosen, index = choose_weights(folder, weights), index_of(folder)
    total = FLOAT_BYTES * sum(math.prod(shape) for shape in index.shapes.values())
    if output.is_dir():
        raise ConfigError(f"{output} is a folder: give the name of a file, such as {output / 'model.safetensors'}")
    require_own_file(output, run_of(folder))
    temporary = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb", buffering=0) as file:
                header, places = _plan(index, _metadata(folder, chosen))
                os.truncate(temporary, len(header) + total)
                file.write(header)
                _copy(
                    folder, index, chosen.kind, file.fileno(), places, lambda done: progress and progress(done, total)
                )
                os.fsync(file.fileno())
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    except Corrupt as error:
        raise ConfigError(f"the checkpoint {folder} cannot be exported: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from error
    return {
        "checkpoint": str(folder),
        "step": chosen.step,
        "weights": chosen.weights,
        "parameters": total // FLOAT_BYTES,
        "bytes": len(header) + total,
        "output": str(output),
    }


def load_task(checkpoint: str | Path, weights: str | None = None) -> NextEmbedding | Classifier:
    """The module that a checkpoint was trained as, with its weights, float32, on the host, in eval mode.

    Of a pretraining with mae or jepa it is the backbone alone, as `NextEmbedding` with bidirectional attention: what
    they have beside it serves nothing but pretraining.

    checkpoint, weights: as in `export_safetensors`
    Raises:
        ConfigError: as there.
    """
    folder = locate_checkpoint(checkpoint)
    config = config_from_dict(read_meta(folder)["config"], str(folder))
    index, kind = index_of(folder), choose_weights(folder, weights).kind
    with torch.device("meta"):
        if config.task == "finetune":
            finetune, backbone = config.finetune, CausalViT(resolve_architecture(config.model))
            classes = index.shapes["head.bias"][0]
            task: NextEmbedding | Classifier = Classifier(
                backbone, classes, pooling=finetune.pooling, causal=finetune.causal
            )
        else:
            architecture = resolve_architecture(config.model, mask_token=config.objective.mask_ratio > 0)
            task = NextEmbedding(CausalViT(architecture), encoding(config.objective))
    task.to_empty(device="cpu")
    parameters = dict(task.named_parameters())
    wanted = [_whole(name, parameter, kind) for name, parameter in parameters.items()]
    passed_over = [
        Shard(name, shape, 0, 0, {kind: torch.empty(0)})
        for name, shape in index.shapes.items()
        if name.startswith(PRETRAINING_ONLY)
    ]
    load_shards(folder, [*wanted, *passed_over])
    return task.eval()


def _whole(name: str, parameter: Tensor, kind: str) -> Shard:
    return Shard(name, tuple(parameter.shape), 0, parameter.numel(), {kind: parameter.detach().view(-1)})


def _metadata(checkpoint: Path, chosen: Choice) -> dict[str, str]:
    metadata = {"format": "pt", "weights": chosen.weights, "step": str(chosen.step), "run": run_of(checkpoint)}
    names = class_names(checkpoint)
    return metadata if names is None else metadata | {"class_names": json.dumps(names)}


def _plan(index: Index, metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of the file, and the byte at which each parameter begins."""
    sizes = {name: FLOAT_BYTES * math.prod(shape) for name, shape in index.shapes.items()}
    header = safetensors_header(list(index.shapes.items()), metadata)
    places, begin = {}, len(header)
    for name, size in sizes.items():
        places[name] = begin
        begin += size
    return header, places


def _copy(
    folder: Path, index: Index, kind: str, file: int, places: dict[str, int], progress: Callable[[int], Any]
) -> None:
    """Every range of `kind`, from its part to its place in `file`; parts are read in order and from front to back."""
    wanted: dict[int, list[tuple[int, int, int]]] = {}  # part -> [(offset there, offset here, bytes)]
    for name, kinds in index.ranges.items():
        for part, start, stop, offset in kinds[kind]:
            size = (stop - start) * FLOAT_BYTES
            wanted.setdefault(part, []).append((offset, places[name] + start * FLOAT_BYTES, size))
    buffer = torch.empty(BLOCK_BYTES // FLOAT_BYTES)
    done = 0
    for part, reads in sorted(wanted.items()):
        with PartReader(folder, index.parts[part], index.block_bytes) as reader:
            for source, target, size in sorted(reads):
                for begin in range(0, size, BLOCK_BYTES):
                    piece = buffer[: min(BLOCK_BYTES, size - begin) // FLOAT_BYTES]
                    reader.read_into(piece, source + begin)
                    _write_at(file, piece.numpy().data.cast("B"), target + begin)
                done += size
                progress(done)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
