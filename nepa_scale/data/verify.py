"""Re-reads shards and names everything that is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nepa_scale.config import ConfigError
from nepa_scale.data.decode import EncodedImage, UndecodableImage
from nepa_scale.data.description import FILE_NAME, Description, ShardDescription
from nepa_scale.data.parallel import in_parallel, usable_cores
from nepa_scale.data.safe_files import sha256
from nepa_scale.data.tar_index import NO_LABEL, SUFFIX, Entry, ShardIndex, index_shard

_DECODED = (64, 64)  # size to which images are brought, which reads all of their bytes


class Problem(NamedTuple):
    """What is wrong: with a shard, or where `key` is not empty with one sample in it."""

    shard: str
    key: str
    why: str


@dataclass(frozen=True)
class Verification:
    """How many samples were found, and all that is wrong with them."""

    samples: int
    problems: list[Problem]


class _Job(NamedTuple):
    tar: Path
    described: ShardDescription | None
    classes: int | None


def verify(folder: str | Path, workers: int | None = None) -> Verification:
    """Re-reads the shards of a folder: checksums, structure, indices, keys and labels, and decodes every image.

    Without `dataset.json` the shards are held against nothing but themselves.

    Raises:
        ConfigError: there are no shards.
    """
    folder = Path(folder).expanduser()
    tars = {tar.name: tar for tar in sorted(folder.glob("*.tar"))}
    problems = []
    described: dict[str, ShardDescription] = {}
    classes = None
    if (folder / FILE_NAME).is_file():
        description = Description.from_json((folder / FILE_NAME).read_bytes(), str(folder / FILE_NAME))
        described, classes = {shard.name: shard for shard in description.shards}, description.classes
        problems = [Problem(name, "", "the shard is missing") for name in described if name not in tars]
        problems += [Problem(name, "", "the shard is not in dataset.json") for name in tars if name not in described]
    if not tars:
        raise ConfigError(f"no shards are found in {folder}")
    jobs = [_Job(tar, described.get(name), classes) for name, tar in tars.items()]
    found = in_parallel(_check, jobs, workers or usable_cores(), "verifying", size=lambda job: job.tar.stat().st_size)
    problems += [problem for problems_of_shard, _ in found for problem in problems_of_shard]
    problems += _repeated_keys([(job.tar.name, keys) for job, (_, keys) in zip(jobs, found, strict=True)])
    return Verification(sum(len(keys) for _, keys in found), problems)


def _check(job: _Job) -> tuple[list[Problem], list[str]]:
    """The shard's problems, and the keys of its samples."""
    name, problems = job.tar.name, []
    index = index_shard(job.tar)
    if job.described is not None:
        if job.tar.stat().st_size != job.described.bytes or sha256(job.tar) != job.described.sha256:
            problems.append(Problem(name, "", "its bytes are not those that were written (checksum)"))
        if len(index) != job.described.samples:
            problems.append(Problem(name, "", f"it holds {len(index)} samples, not {job.described.samples}"))
    beside = job.tar.with_name(name + SUFFIX)
    if beside.exists() and not _same_index(index, beside):
        problems.append(Problem(name, "", f"the index {beside.name} does not fit the shard: remove it"))
    keys = []
    with job.tar.open("rb") as file:
        for number in range(len(index)):
            entry = index[number]
            keys.append(entry.key)
            image = os.pread(file.fileno(), entry.size, entry.offset)
            problems += [Problem(name, entry.key, why) for why in _flaws(entry, image, job.classes)]
    return problems, keys


def _flaws(entry: Entry, image: bytes, classes: int | None) -> list[str]:
    if entry.flaw is not None:
        return [entry.flaw]
    flaws = []
    if classes is not None and entry.label == NO_LABEL:
        flaws.append("no label")
    elif classes is not None and entry.label >= classes:
        flaws.append(f"label {entry.label} is not below the {classes} classes")
    try:
        EncodedImage(image).resized(_DECODED)
    except UndecodableImage as error:
        flaws.append(f"the image cannot be decoded: {error}")
    return flaws


def _same_index(fresh: ShardIndex, path: Path) -> bool:
    try:
        kept = ShardIndex.load(path)
    except (ValueError, OSError):
        return False
    return len(kept) == len(fresh) and all(kept[number] == fresh[number] for number in range(len(fresh)))


def _repeated_keys(shards: list[tuple[str, list[str]]]) -> list[Problem]:
    """Keys that two shards share; within a shard the index tells."""
    count = Counter(key for _, keys in shards for key in set(keys) if key)
    return [
        Problem(name, key, "another shard has a sample with the same key")
        for name, keys in shards
        for key in sorted(set(keys))
        if count[key] > 1
    ]
