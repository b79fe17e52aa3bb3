"""Writes one shard: a tar that appears complete, with its index beside it, or not at all."""

from __future__ import annotations

import hashlib
import os
import tarfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nepa_scale.data.description import ShardDescription
from nepa_scale.data.tar_index import SUFFIX, index_shard

_BLOCK = 512
_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"P6", "ppm"), (b"P5", "ppm"))


class SourceSample(NamedTuple):
    """What goes into a shard: `label` is None for an unlabelled image."""

    key: str
    image: bytes
    label: int | None


def write_shard(path: Path, samples: Iterable[SourceSample]) -> ShardDescription:
    """Writes the tar `path` and its index; equal samples give equal bytes, whoever writes them and whenever."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            tar = _Tar(file)
            count = 0
            for sample in samples:
                tar.add(f"{sample.key}.{extension(sample.image)}", sample.image)
                if sample.label is not None:
                    tar.add(f"{sample.key}.cls", str(sample.label).encode())
                count += 1
            tar.end()
            os.fsync(file.fileno())
        status = part.stat()
        index_shard(part).save(path.with_name(path.name + SUFFIX), status.st_mtime_ns)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return ShardDescription(path.name, count, status.st_size, tar.sha256.hexdigest())


def extension(image: bytes) -> str:
    """The extension that the content calls for, whatever the file was called; `jpg` where it is not known."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for signature, name in _SIGNATURES if image.startswith(signature)), "jpg")


class _Tar:
    """A tar without times, owners or anything else that could differ between two runs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))

    def end(self) -> None:
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.sha256.update(content)
        self._size += len(content)
