"""The official ImageNet-1k files: the training tar of class tars, the validation tar, the devkit with its labels."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import IO, Any

from nepa_scale.config import ConfigError
from nepa_scale.data.listing import Item, Listing, safe_key
from nepa_scale.data.tar_index import IMAGE_EXTENSIONS, DamagedTar, members

DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"
_VAL_NUMBER = re.compile(r"_val_0*([1-9]\d*)\.")


def list_imagenet_train(tar: Path) -> Listing:
    """A tar of class tars `n01440764.tar`, read in place; classes in the order of their names, as ImageNet's are.

    Raises:
        ConfigError: the tar or a class tar is damaged.
    """
    classes = {Path(m.name).stem: m for m in _whole(tar) if m.name.endswith(".tar")}
    items = []
    for label, name in enumerate(sorted(classes)):
        outer = classes[name]
        for member in _whole(tar, outer.offset, outer.offset + outer.size):
            if _is_image(member.name):
                key = safe_key(f"{name}/{Path(member.name).stem}")
                items.append(Item(key, str(tar), member.offset, member.size, label))
    return Listing(items, sorted(classes), len(classes))


def list_imagenet_val(tar: Path, devkit: Path | None) -> Listing:
    """The flat validation tar, with labels from the devkit, a folder or its `.tar.gz`; None: looked for beside the tar.

    Raises:
        ConfigError: no devkit, or a file that is not what it should be.
    """
    truth, synsets = _read_devkit(devkit or _devkit_beside(tar))
    names = sorted(synsets.values())
    index = {name: label for label, name in enumerate(names)}
    items = []
    for member in sorted(_whole(tar), key=lambda member: member.name):
        number = _VAL_NUMBER.search(member.name)
        if not _is_image(member.name) or number is None:
            continue
        if int(number[1]) > len(truth):
            raise ConfigError(f"{tar} holds {member.name}, but the devkit has labels of {len(truth)} images only")
        label = index[synsets[truth[int(number[1]) - 1]]]
        items.append(Item(safe_key(Path(member.name).stem), str(tar), member.offset, member.size, label))
    return Listing(items, names, len(names))


def _whole(tar: Path, start: int = 0, end: int | None = None) -> list[Any]:
    try:
        return list(members(tar, start, end))
    except DamagedTar as damage:
        raise ConfigError(f"{tar} is damaged ({damage}): download it again") from damage


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not Path(name).name.startswith(".")


def _devkit_beside(tar: Path) -> Path:
    for name in (DEVKIT, f"{DEVKIT}.tar.gz"):
        if (tar.parent / name).exists():
            return tar.parent / name
    raise ConfigError(f"the labels of {tar} are in {DEVKIT}.tar.gz: put it beside the tar, or name it with --devkit")


def _read_devkit(devkit: Path) -> tuple[list[int], dict[int, str]]:
    """The class ID (from 1) of each validation image, and the synset of each ID."""
    try:
        truth = [int(line) for line in _devkit_file(devkit, _GROUND_TRUTH).decode().split()]
        synsets = _read_synsets(io.BytesIO(_devkit_file(devkit, _META)))
        unknown = set(truth) - set(synsets)
        if unknown:
            raise ValueError(f"the class ID {min(unknown)} has no synset")
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{devkit} is not the ImageNet devkit {DEVKIT}: {error}") from error
    return truth, synsets


def _devkit_file(devkit: Path, name: str) -> bytes:
    if devkit.is_dir():
        return (devkit / name).read_bytes()
    with tarfile.open(devkit) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(name):
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise OSError(f"{name} is not in it")


def _read_synsets(meta: IO[bytes]) -> dict[int, str]:
    """ID -> synset of the classes; meta.mat also lists the inner nodes of the hierarchy."""
    from scipy.io import loadmat  # takes a moment to import, and nothing else here needs it

    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    columns = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
    return {int(number): str(name) for number, name, children in columns if int(children) == 0}
