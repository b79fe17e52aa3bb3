"""Makes a set of shards from images: in parallel, the same bytes each time, and going on where a killed run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_words
from nepa_scale.data.decode import UndecodableImage
from nepa_scale.data.description import FILE_NAME, Description, ShardDescription
from nepa_scale.data.ingest import list_input
from nepa_scale.data.listing import Item, Listing
from nepa_scale.data.order import Permutation
from nepa_scale.data.parallel import in_parallel, usable_cores
from nepa_scale.data.reencode import reencode
from nepa_scale.data.safe_files import write_atomically
from nepa_scale.data.shard_writer import SourceSample, write_shard

SAMPLES_PER_SHARD = 1000
_UNFINISHED = ".making"  # the folder in the output that is there until the set is complete
_RECIPE = "recipe.json"  # in it, once the first shard is about to be written


class _Job(NamedTuple):
    """One shard to write; `record` is the file that says it is written."""

    tar: Path
    record: Path
    items: list[Item]
    resize: int | None
    quality: int | None


def make_shards(
    source: str | Path,
    output: str | Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    resize: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    devkit: Path | None = None,
    class_list: Path | None = None,
) -> Description:
    """Writes the images of `source`, shuffled across classes by `seed`, as shards with indices and `dataset.json`.

    source: a folder with a folder for each class (or images alone, unlabelled), ImageNet's train or val tar, parquet
        files, or shards
    output: a folder; made if missing. A set that is complete is left as it is, an unfinished one is completed
    resize: shorter side in pixels of the images that are larger; None keeps their bytes
    quality: of JPEGs, 1 to 100, where they are encoded again
    workers: processes; None: one for each core. With more than one, a calling script needs the usual
        `if __name__ == "__main__"`
    devkit: ImageNet's devkit (folder or .tar.gz), for the labels of the val tar; None: looked for beside the tar
    class_list: the classes of a folder in the order of their labels (see `read_class_list`); None: sorted by name

    Raises:
        ConfigError: the input is not understood, or the output holds something else.
        OSError: a file cannot be read or written.
    """
    output = Path(output).expanduser()
    _check_arguments(samples_per_shard, resize, quality)
    if Path(source).expanduser().resolve() in output.resolve().parents:
        raise ConfigError(f"the output {output} lies in the input, and would be taken for a class: name another folder")
    workers = workers or usable_cores()
    with _only_writer(output) as unfinished:
        listing = list_input(str(source), unfinished / "parquet", devkit=devkit, class_list=class_list, workers=workers)
        settings = {"seed": seed, "samples_per_shard": samples_per_shard, "resize": resize, "quality": quality}
        recipe = settings | {"input_sha256": _fingerprint(listing)}
        if (complete := _complete(output, recipe)) is not None:
            return complete
        _keep_recipe(unfinished / _RECIPE, recipe, output)
        jobs = list(_jobs(listing, output, unfinished, samples_per_shard, resize, quality, seed))
        records = in_parallel(_write, jobs, workers, "writing shards", size=lambda job: len(job.items))
        description = Description(
            shards=[ShardDescription(**record["shard"]) for record in records],
            classes=listing.classes,
            class_names=listing.class_names,
            recipe=recipe,
            left_out=[list(pair) for pair in listing.left_out] + [p for record in records for p in record["left_out"]],
        )
        write_atomically(output / FILE_NAME, description.to_json().encode())
    return description


def _check_arguments(samples_per_shard: int, resize: int | None, quality: int | None) -> None:
    if samples_per_shard < 1:
        raise ConfigError(f"samples per shard must be at least 1, not {samples_per_shard}")
    if resize is not None and resize < 1:
        raise ConfigError(f"the size to resize to must be at least 1 pixel, not {resize}")
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"JPEG quality must be between 1 and 100, not {quality}")


@contextlib.contextmanager
def _only_writer(output: Path) -> Iterator[Path]:
    """Gives the folder for unfinished work, and removes it when all is done; refuses a second writer."""
    unfinished = output / _UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    with (unfinished / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing shards to {output}: wait for it, or stop it") from error
        for part in output.glob(".*.part"):  # of a run that was killed
            part.unlink(missing_ok=True)
        try:
            yield unfinished
        except ConfigError:
            if not (unfinished / _RECIPE).exists():  # nothing was begun: leave no trace
                shutil.rmtree(unfinished)
                with contextlib.suppress(OSError):
                    output.rmdir()
            raise
        shutil.rmtree(unfinished)


def _fingerprint(listing: Listing) -> str:
    digest = hashlib.sha256(json.dumps(listing.class_names).encode())
    for item in listing.items:
        digest.update(f"{item.key}\0{item.size}\0{item.label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _complete(output: Path, recipe: dict[str, Any]) -> Description | None:
    """The set in `output`, where it is this one and all there."""
    path = output / FILE_NAME
    if not path.exists():
        return None
    description = Description.from_json(path.read_bytes(), str(path))
    if description.recipe != recipe:
        raise _other_set(output)
    sizes = {shard.name: shard.bytes for shard in description.shards}
    if all((output / name).exists() and (output / name).stat().st_size == size for name, size in sizes.items()):
        return description
    return None


def _keep_recipe(path: Path, recipe: dict[str, Any], output: Path) -> None:
    if path.exists():
        if json.loads(path.read_bytes()) != recipe:
            raise _other_set(output)
    elif next(output.glob("*.tar"), None) is not None and not (output / FILE_NAME).exists():
        raise _other_set(output)
    else:
        write_atomically(path, json.dumps(recipe).encode())


def _other_set(output: Path) -> ConfigError:
    return ConfigError(
        f"{output} holds shards of another input, or made with other settings: remove them or name another folder"
    )


def _jobs(
    listing: Listing,
    output: Path,
    unfinished: Path,
    samples_per_shard: int,
    resize: int | None,
    quality: int | None,
    seed: int,
) -> Iterator[_Job]:
    count = len(listing.items)
    order = Permutation(count, hash_words("make_shards", seed))(np.arange(count, dtype=np.int64)).tolist()
    for number, first in enumerate(range(0, count, samples_per_shard)):
        items = [listing.items[place] for place in order[first : first + samples_per_shard]]
        name = f"shard-{number:06d}"
        yield _Job(output / f"{name}.tar", unfinished / f"{name}.json", items, resize, quality)


def _write(job: _Job) -> dict[str, Any]:
    """Writes the shard unless it is there; gives its description and what was left out of it."""
    with contextlib.suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads(job.record.read_bytes())
        if job.tar.stat().st_size == record["shard"]["bytes"]:
            return record
    left_out: list[list[str]] = []
    shard = write_shard(job.tar, _samples(job, left_out))
    record = {"shard": dataclasses.asdict(shard), "left_out": left_out}
    write_atomically(job.record, json.dumps(record).encode())
    return record


def _samples(job: _Job, left_out: list[list[str]]) -> Iterator[SourceSample]:
    for item in job.items:
        image = item.read()
        if not image:
            left_out.append([item.key, "the image is empty"])
            continue
        if job.resize is not None or job.quality is not None:
            try:
                image = reencode(image, job.resize, job.quality)
            except UndecodableImage as error:
                left_out.append([item.key, str(error)])
                continue
        yield SourceSample(item.key, image, item.label)
