"""Hugging Face's parquet exports: a column of encoded images and one of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nepa_scale.config import ConfigError
from nepa_scale.data.listing import safe_key
from nepa_scale.data.parallel import in_parallel
from nepa_scale.data.shard_writer import SourceSample, write_shard

_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_ROWS = 64  # read at once


class _Columns(NamedTuple):
    image: str
    label: str | None
    class_names: list[str] | None


class _Job(NamedTuple):
    file: Path
    number: int
    columns: _Columns
    target: Path


def spool_parquet(files: list[Path], scratch: Path, workers: int) -> list[str] | None:
    """Copies the images of parquet files, in order, to shards in the folder `scratch`; returns the classes' names.

    A parquet file gives up its rows only hundreds at a time; shuffled across a whole data set, they are read from here.
    Files that are there already are kept.

    Raises:
        ConfigError: no pyarrow, or files without a column of images.
    """
    columns = _find_columns(files[0])
    scratch.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(file, number, columns, scratch / f"parquet-{number:05d}.tar") for number, file in enumerate(files)]
    missing = [job for job in jobs if not job.target.exists()]
    in_parallel(_spool, missing, workers, "reading parquet", size=lambda job: job.file.stat().st_size)
    return columns.class_names


def _spool(job: _Job) -> None:
    write_shard(job.target, _samples(job))


def _samples(job: _Job) -> Iterator[SourceSample]:
    taken: set[str] = set()
    for row, (image, label) in enumerate(_rows(job)):
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        key = safe_key(str(Path(path).with_suffix(""))) if path else f"{job.number:05d}_{row:07d}"
        if key in taken:
            key = f"{key}_{job.number:05d}_{row:07d}"
        taken.add(key)
        yield SourceSample(key.lstrip("/"), content or b"", None if label is None or label < 0 else int(label))


def _rows(job: _Job) -> Iterator[tuple[Any, int | None]]:
    names = [name for name in (job.columns.image, job.columns.label) if name]
    for batch in _open(job.file).iter_batches(batch_size=_ROWS, columns=names):
        images = batch.column(job.columns.image).to_pylist()
        labels = batch.column(job.columns.label).to_pylist() if job.columns.label else [None] * len(images)
        yield from zip(images, labels, strict=True)


def _open(file: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow: pip install 'nepa_scale[parquet]'") from error
    try:
        return ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file} is not a parquet file: {error}") from error


def _find_columns(file: Path) -> _Columns:
    schema = _open(file).schema_arrow
    images = [field.name for field in schema if _holds_images(field.type)]
    if len(images) != 1:
        raise ConfigError(
            f"{file} needs one column of image bytes, but among its columns {', '.join(schema.names)} are {len(images)}"
        )
    label = next((name for name in _LABEL_NAMES if name in schema.names), None)
    if label is not None and "int" not in str(schema.field(label).type):
        raise ConfigError(f"the column '{label}' of {file} must hold whole numbers, not {schema.field(label).type}")
    return _Columns(images[0], label, _class_names(schema.metadata or {}, label))


def _holds_images(kind: Any) -> bool:
    text = str(kind)
    return text in ("binary", "large_binary") or (text.startswith("struct<") and "bytes: " in text)


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> list[str] | None:
    """The names that the `datasets` library keeps in the schema: a list, or an object from the label to the name."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else [str(name) for name in names]
