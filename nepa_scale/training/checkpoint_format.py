"""The checkpoint on disk: part files of flat float32 ranges, and an index of where each range of a parameter lies.

    RUN/checkpoints/
      latest -> step_00002000       symbolic links, replaced in one go
      best -> step_00001000         (with best.json: by which metric, and its value)
      step_00001000/
      step_00002000/
        index.json                  every parameter's shape; for each of "master", "exp_avg", "exp_avg_sq" and "ema"
                                    its ranges [part, start, stop, offset]; every part's size and checksums
        meta.json                   step, counters, configuration, versions
        part_00000.safetensors      what rank 0 wrote: one float32 vector for each range it held
        part_00001.safetensors      what rank 1 wrote
        ...

A range says that elements [start, stop) of the flattened parameter begin at byte `offset` of which part. How many parts
there are and where they were cut depends on who wrote them and matters to nobody who reads: a reader collects the bytes
of the ranges it wants from wherever they lie. Blocks of parts have checksums in the index, and the two JSON files carry
one of themselves. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nepa_scale.config import ConfigError
from nepa_scale.sharding.shard import Shard
from nepa_scale.training.part_files import BLOCK_BYTES, FLOAT_BYTES, Corrupt, Part, PartReader, Piece, checksum

FORMAT = 1
INDEX, META = "index.json", "meta.json"
# what a checkpoint may lack, and what is read in its place: a run may start to average its weights at any time
_STAND_IN = {"ema": "master"}

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Index:
    """Where everything is.

    ranges: name -> kind -> [(part, start, stop, offset)], by start and without gaps
    block_bytes: the size of the blocks that the parts' checksums are of
    """

    parts: list[Part]
    shapes: Shapes
    ranges: dict[str, dict[str, list[tuple[int, int, int, int]]]]
    block_bytes: int


def build_index(parts: list[Part], pieces: list[list[Piece]], shapes: Shapes) -> Index:
    """pieces: of each part. Raises ValueError where some elements of a parameter are missing or there twice."""
    ranges: dict[str, dict[str, list[tuple[int, int, int, int]]]] = {name: {} for name in sorted(shapes)}
    for number, held in enumerate(pieces):
        for piece in held:
            found = ranges[piece.name].setdefault(piece.kind, [])
            if piece.stop > piece.start:
                found.append((number, piece.start, piece.stop, piece.offset))
    for name, kinds in ranges.items():
        for kind, found in kinds.items():
            found.sort(key=lambda item: item[1])
            edges = [0, *(stop for _, _, stop, _ in found)]
            if edges != [*(start for _, start, _, _ in found), math.prod(shapes[name])]:
                raise ValueError(f"the ranks' ranges of {name} ({kind}) leave gaps or overlap")
    return Index(parts, shapes, ranges, BLOCK_BYTES)


def write_index(folder: Path, index: Index) -> None:
    """Writes `index.json` durably. Raises OSError."""
    parameters = {name: {"shape": index.shapes[name], "ranges": kinds} for name, kinds in index.ranges.items()}
    parts = [dataclasses.asdict(part) for part in index.parts]
    values = {"format": FORMAT, "block_bytes": index.block_bytes, "parts": parts, "parameters": parameters}
    _write_sealed(folder / INDEX, values)


def read_index(folder: Path) -> Index:
    """Raises Corrupt, or ConfigError where a newer program wrote it."""
    values = _read_sealed(folder / INDEX)
    if values["format"] != FORMAT:
        raise ConfigError(f"{folder} has format {values['format']}, but this program reads {FORMAT}: update nepa_scale")
    return Index(
        parts=[Part(**part) for part in values["parts"]],
        shapes={name: tuple(entry["shape"]) for name, entry in values["parameters"].items()},
        ranges={
            name: {kind: [tuple(item) for item in found] for kind, found in entry["ranges"].items()}
            for name, entry in values["parameters"].items()
        },
        block_bytes=values["block_bytes"],
    )


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes `meta.json` durably. Raises OSError."""
    _write_sealed(folder / META, meta)


def read_meta(path: str | Path) -> dict[str, Any]:
    """What was saved beside the tensors: step, counters, configuration, versions.

    Raises:
        ConfigError: there is no checkpoint, or its `meta.json` is damaged.
    """
    try:
        return _read_sealed(Path(path) / META)
    except Corrupt as error:
        raise ConfigError(f"no usable checkpoint: {error}") from error


def _write_sealed(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, separators=(",", ":"))
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"checksum":"{checksum(text.encode())}","values":{text}}}\n')
        file.flush()
        os.fsync(file.fileno())


def _read_sealed(path: Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = sealed["values"]
        if sealed["checksum"] == checksum(json.dumps(values, separators=(",", ":")).encode()):
            return values
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise Corrupt(f"{path} is damaged")


def sync_folder(path: Path) -> None:
    """Makes the folder's entries (names, renames) durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint, or None; each rank reads its share of it. Collective."""
    return first(everywhere(_damage_in_share(folder)))


def _damage_in_share(folder: Path) -> str | None:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        _read_sealed(folder / META)
        index = read_index(folder)
        parts = index.parts
        blocks = [(part, block) for part in parts for block in range(len(part.checksums))]
        mine = blocks[len(blocks) * rank // size : len(blocks) * (rank + 1) // size]
        for part in parts:
            with PartReader(folder, part, index.block_bytes) as reader:  # opening it compares the size
                for _, block in (item for item in mine if item[0] is part):
                    reader.verify(block)
    except (Corrupt, ConfigError) as error:
        return str(error)
    except Exception as error:  # whatever it is: the other ranks are waiting to hear of it
        return f"{folder} cannot be read: {_in_words(error)}"
    return None


def load_shards(path: str | Path, shards: list[Shard]) -> None:
    """Fills the tensors of `shards` in place, whoever wrote the checkpoint; reads what overlaps them and no more.

    An "ema" that the checkpoint lacks is filled with the masters; kinds that the shards lack are not read. Collective
    where torch.distributed is initialised: all ranks raise what one does.

    Raises:
        ConfigError: parameters or shapes differ (the first difference is named), or what was read is damaged.
    """
    folder = Path(path)
    problem, index = None, None
    try:
        index = read_index(folder)
    except Exception as error:
        problem = f"no usable checkpoint: {_in_words(error)}"
    shapes = everywhere({shard.name: tuple(shard.shape) for shard in shards})
    if index is not None:
        problem = _difference(index, shapes, {kind for shard in shards for kind in shard.tensors}, folder)
    _raise_together(problem)
    assert index is not None
    try:
        _read(folder, index, shards)
    except Exception as error:
        problem = f"the checkpoint {folder} cannot be loaded: {_in_words(error)}"
    _raise_together(problem)


def _difference(index: Index, shapes: Iterable[Shapes], kinds: Iterable[str], folder: Path) -> str | None:
    """The first thing in which the checkpoint and the model (as all ranks together have it) are not alike."""
    wanted = {name: shape for held in shapes for name, shape in held.items()}
    for name, shape in wanted.items():
        if name not in index.shapes:
            return f"the checkpoint {folder} lacks the parameter {name}, which the model has"
        if index.shapes[name] != shape:
            return f"{name} is {list(index.shapes[name])} in the checkpoint {folder}, but {list(shape)} in the model"
        for kind in kinds:
            if kind not in index.ranges[name] and _STAND_IN.get(kind) not in index.ranges[name]:
                return f"the checkpoint {folder} lacks {kind} of {name}"
    for name in index.shapes:
        if name not in wanted:
            return f"the checkpoint {folder} holds the parameter {name}, which the model lacks"
    return None


def _read(folder: Path, index: Index, shards: list[Shard]) -> None:
    wanted: dict[int, list[tuple[int, torch.Tensor]]] = {}  # part -> [(offset, where to)]
    for shard in shards:
        for kind, tensor in shard.tensors.items():
            kinds = index.ranges[shard.name]
            for part, start, stop, offset in kinds[kind if kind in kinds else _STAND_IN[kind]]:
                low, high = max(start, shard.start), min(stop, shard.stop)
                if low < high:
                    target = tensor[low - shard.start : high - shard.start]
                    wanted.setdefault(part, []).append((offset + (low - start) * FLOAT_BYTES, target))
    for part, reads in sorted(wanted.items()):
        with PartReader(folder, index.parts[part], index.block_bytes) as reader:
            for offset, target in sorted(reads, key=lambda item: item[0]):
                reader.read_into(target, offset)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, Corrupt | ConfigError) else f"{type(error).__name__}: {error}"


def _raise_together(problem: str | None) -> None:
    found = first(everywhere(problem))
    if found is not None:
        raise ConfigError(found)


def everywhere(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks. Collective where torch.distributed is initialised."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first(values: Iterable[Any]) -> Any:
    """The first that is not None, if any."""
    return next((value for value in values if value is not None), None)
