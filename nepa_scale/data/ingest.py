"""Tells what an input is, and lists its images: a folder, an ImageNet tar, parquet files, or existing shards."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.description import FILE_NAME
from nepa_scale.data.imagenet_files import list_imagenet_train, list_imagenet_val
from nepa_scale.data.listing import Item, Listing, relative_key, with_unique_keys
from nepa_scale.data.parallel import in_threads
from nepa_scale.data.parquet_files import spool_parquet
from nepa_scale.data.shard_set import ShardSet
from nepa_scale.data.tar_index import IMAGE_EXTENSIONS, DamagedTar, members

_SPLITS = {"train", "val", "validation", "test"}


def list_input(source: str, scratch: Path, *, devkit: Path | None, class_list: Path | None, workers: int) -> Listing:
    """Lists the images of `source` in an order that depends on nothing but the input.

    scratch: a folder for the images of parquet files, which cannot be read one by one where they are
    class_list: the classes of a folder in their order; None: the names of its folders, sorted

    Raises:
        ConfigError: it is none of the inputs that are understood, or holds no images.
    """
    path = Path(source).expanduser()
    if parquet := _parquet_files(source):
        names = spool_parquet(parquet, scratch, workers)
        listing = list_shards(str(scratch))
        if names:
            listing.class_names, listing.classes = names, len(names)
    elif path.is_dir() and not (path / FILE_NAME).is_file() and not list(path.glob("*.tar")):
        listing = list_folder(path, class_list)
    elif path.is_file() and (kind := _imagenet_kind(path)):
        listing = list_imagenet_train(path) if kind == "train" else list_imagenet_val(path, devkit)
    else:
        listing = list_shards(_checked_shards(source))
    if not listing.items:
        raise ConfigError(f"no images ({', '.join(sorted(IMAGE_EXTENSIONS))}) are found in {source}")
    listing.items = with_unique_keys(listing.items)
    return listing


def list_folder(root: Path, class_list: Path | None = None) -> Listing:
    """A folder for each class; or images alone, which get no label.

    Raises:
        ConfigError: the folders are splits rather than classes, or a class is not in `class_list`.
    """
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if folders and set(folders) <= _SPLITS:
        raise ConfigError(f"{root} holds {' and '.join(folders)}: make shards of each, as from {root / folders[0]}")
    names = read_class_list(class_list) if class_list else folders
    unknown = set(folders) - set(names)
    if unknown:
        raise ConfigError(f"the class '{min(unknown)}' of {root} is not in {class_list}")
    if not folders:
        return Listing(list(images_under(root, root, None)), None, None)
    label = {name: number for number, name in enumerate(names)}
    found = in_threads(lambda name: list(images_under(root / name, root, label[name])), folders, "listing images")
    return Listing([item for some in found for item in some], names, len(names))


def list_shards(source: str) -> Listing:
    """The usable samples of existing shards; the others are left out, with the reason.

    Raises:
        ConfigError: remote shards do not all fit into the cache.
    """
    data = DataConfig()
    shards = ShardSet.open(source, data)
    listing = Listing([], shards.class_names, shards.classes)
    for number, name in enumerate(shards.names):
        for entry in shards.entries(number):
            if entry.flaw is not None:
                listing.left_out.append((entry.key or name, entry.flaw))
                continue
            label = None if entry.label < 0 else entry.label
            file = str(shards.ensure_local(number))
            listing.items.append(Item(entry.key, file, entry.offset, entry.size, label))
    if shards.remote and not all(Path(file).exists() for file in {item.file for item in listing.items}):
        raise ConfigError(
            f"{source} is larger than the cache of {data.cache_gigabytes:g} GB, and its images are to be shuffled: "
            "copy the shards to a local folder, and give that"
        )
    return listing


def read_class_list(path: Path) -> list[str]:
    """Class names in the order of their labels: from a `dataset.json`, a JSON object name -> label, or a text file
    whose lines begin with the name.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a name
        if path.suffix != ".json":
            return [line.split()[0] for line in text.splitlines() if line.strip()]
        fields = json.loads(text)
        names = fields["class_names"] if "class_names" in fields else sorted(fields, key=fields.__getitem__)
        if "class_names" not in fields and sorted(fields.values()) != list(range(len(fields))):
            raise ValueError("its labels are not 0, 1, 2, ...")
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the class list {path}: {error}") from error


def images_under(folder: Path, root: Path, label: int | None) -> Iterator[Item]:
    """The images in `folder` and the folders in it, by name; keys are their paths from `root`."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                path = Path(parent, name)
                yield Item(relative_key(path, root), str(path), 0, path.stat().st_size, label)


def _imagenet_kind(path: Path) -> str | None:
    """`train` for a tar of tars, `val` for the validation tar, None for anything else."""
    try:
        first = next(members(path), None)
    except (DamagedTar, OSError):
        return None
    if first is None:
        return None
    if first.name.endswith(".tar"):
        return "train"
    return "val" if "ILSVRC2012_val_" in first.name else None


def _checked_shards(source: str) -> str:
    """Refuses what is not there, and a folder that holds ImageNet's own tars."""
    if not Path(source).expanduser().exists() and not any(mark in source for mark in ("::", "{", "*", "?", "://")):
        raise ConfigError(f"{source} does not exist")
    for tar in Path(source).expanduser().glob("*.tar"):
        if _imagenet_kind(tar):
            raise ConfigError(f"{source} holds ImageNet's own tars: name one of them, as {tar}")
    return source


def _parquet_files(source: str) -> list[Path]:
    """The parquet files that `source` names: a file, a glob pattern, or a folder of files of one split."""
    path = Path(source).expanduser()
    files = (
        sorted(path.rglob("*.parquet")) if path.is_dir() else [Path(match) for match in sorted(glob.glob(str(path)))]
    )
    if not files or any(file.suffix != ".parquet" for file in files):
        return []
    splits = sorted({re.split(r"[-_.]", file.name)[0] for file in files} & _SPLITS)
    if len(splits) > 1:
        raise ConfigError(
            f"{source} holds {' and '.join(splits)}: make shards of each, as from "
            f"'{files[0].parent}/{splits[0]}*.parquet'"
        )
    return files
