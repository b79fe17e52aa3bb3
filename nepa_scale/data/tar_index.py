"""The offset index of a WebDataset tar: where each sample's image lies, and its label.

Layout of an index file, little-endian:

    header    magic "NEPAIDX1", then four uint64: samples, bytes of the shard, bytes of the keys, bytes of the reasons
    entries   24 bytes a sample: image offset u64, image bytes u32, label i32, end of the key u32, flaw u32
    keys      the samples' keys, UTF-8, end to end
    reasons   a JSON list of strings; flaw f > 0 is reasons[f - 1], and says why the sample cannot be read

The file's modification time is that of the shard it was made from: a shard that changed since has another time or
another size, and is indexed again. Every index has at least one entry: a shard with nothing usable in it has one
flawed entry that says so. Damage is thus met, counted and named where samples are read, and nowhere else.
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nepa_scale.counter_random import hash_array
from nepa_scale.data.safe_files import write_atomically

SUFFIX = ".idx"
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "ppm"})
NO_LABEL = -1

_MAGIC = b"NEPAIDX1"
_HEADER = struct.Struct("<8sQQQQ")
_ENTRY = struct.Struct("<QIiII")
_KEY_END = struct.Struct("<I")
_KEY_END_OFFSET = 16
_LABEL_OFFSET = 12
_SIZE_OFFSET = 8
_BLOCK = 512
_WINDOW = 4096
_LARGEST = {"image": 2**32 - 1, "label": 2**31 - 1, "text": 1 << 20}


class Entry(NamedTuple):
    """One sample: `flaw` is None where it can be read; `label` is NO_LABEL where the shard gives none."""

    key: str
    offset: int
    size: int
    label: int
    flaw: str | None


class ShardIndex:
    """The index of one shard, over a buffer that is a memory-mapped index file or its content."""

    def __init__(self, buffer: memoryview) -> None:
        """Raises ValueError where `buffer` is not a whole index."""
        if len(buffer) < _HEADER.size or bytes(buffer[:8]) != _MAGIC:
            raise ValueError("not an index file of this version")
        _, self.samples, self.shard_bytes, key_bytes, reason_bytes = _HEADER.unpack_from(buffer)
        self._keys = _HEADER.size + self.samples * _ENTRY.size
        reasons = self._keys + key_bytes
        if len(buffer) != reasons + reason_bytes:
            raise ValueError("an incomplete index file")
        self._buffer = buffer
        self._reasons: list[str] = json.loads(bytes(buffer[reasons:])) if reason_bytes else []

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Maps the file: its pages are shared by all processes, and no file descriptor stays open.

        Raises:
            OSError: it cannot be read; FileNotFoundError where it is not there.
            ValueError: it is not a whole index.
        """
        try:
            tensor = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        except RuntimeError as error:
            path.stat()  # raises where it was removed just now
            raise OSError(f"cannot map {path}: {error}") from error
        return cls(memoryview(tensor.numpy()))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self.samples)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 [samples], NO_LABEL where there is none; a view of the index."""
        return np.ndarray((self.samples,), np.dtype("<i4"), self._buffer, _HEADER.size + _LABEL_OFFSET, (_ENTRY.size,))

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """Of the images, in bytes, uint32 [samples]; 0 where there is none; a view of the index."""
        return np.ndarray((self.samples,), np.dtype("<u4"), self._buffer, _HEADER.size + _SIZE_OFFSET, (_ENTRY.size,))

    def key_hashes(self) -> NDArray[np.uint64]:
        """A hash of each sample's key, uint64 [samples]."""
        ends = np.ndarray(
            (self.samples,), np.dtype("<u4"), self._buffer, _HEADER.size + _KEY_END_OFFSET, (_ENTRY.size,)
        )
        return hash_texts(np.frombuffer(self._buffer, np.uint8, int(ends[-1]), self._keys), ends.astype(np.int64))

    def __getitem__(self, number: int) -> Entry:
        at = _HEADER.size + number * _ENTRY.size
        offset, size, label, key_end, flaw = _ENTRY.unpack_from(self._buffer, at)
        key_start = _KEY_END.unpack_from(self._buffer, at - _ENTRY.size + _KEY_END_OFFSET)[0] if number else 0
        key = str(self._buffer[self._keys + key_start : self._keys + key_end], "utf-8")
        return Entry(key, offset, size, label, self._reasons[flaw - 1] if flaw else None)

    def save(self, path: Path, shard_mtime_ns: int) -> None:
        """Writes the index file, whole or not at all."""
        write_atomically(path, bytes(self._buffer), shard_mtime_ns)


def hash_texts(characters: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each of the byte strings that lie end to end in `characters`, uint64 [texts].

    Each is a sum of its bytes by weights that depend on their places: one pass over all, without a loop.
    """
    starts = np.concatenate([[0], ends[:-1]])
    places = np.arange(len(characters)) - np.repeat(starts, ends - starts)
    terms = (characters.astype(np.uint64) + np.uint64(1)) * hash_array(places, "text").view(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return sums[ends] - sums[starts]


def index_shard(path: Path) -> ShardIndex:
    """Reads the headers and labels of the tar at `path`, no image; damage becomes flawed entries."""
    collector = _Collector()
    with path.open("rb", buffering=0) as file:
        shard_bytes = os.fstat(file.fileno()).st_size
        window = _Window(file.fileno(), shard_bytes)
        try:
            for member in _members(window, path, 0, shard_bytes):
                collector.add(member, window)
        except DamagedTar as damage:
            collector.damage(str(damage))
    return ShardIndex(memoryview(collector.pack(shard_bytes)))


class DamagedTar(Exception):
    """The tar cannot be followed any further; the message says why."""


class Member(NamedTuple):
    """A regular file in a tar: its content is `size` bytes at `offset` of the tar's file."""

    name: str
    offset: int
    size: int


def members(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files of the tar that lies in bytes [start, end) of the file at `path`, in order; reads headers only.

    Raises:
        DamagedTar: a header is damaged, or the tar ends too early.
    """
    with path.open("rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size if end is None else end
        for member in _members(_Window(file.fileno(), total), path, start, total):
            if member.offset + member.size > total:
                raise DamagedTar(f"{path} is cut short inside {member.name}")
            yield member


class _Window:
    """Small reads at growing offsets, most of them served from the last 4 KiB read."""

    def __init__(self, descriptor: int, total: int) -> None:
        self._descriptor = descriptor
        self.total = total
        self._start = 0
        self._bytes = b""

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        at = offset - self._start
        if at < 0 or at + size > len(self._bytes):
            self._start, at = offset, 0
            self._bytes = os.pread(self._descriptor, max(size, _WINDOW), offset)
        return self._bytes[at : at + size]


def _members(window: _Window, path: Path, at: int, end: int) -> Iterator[Member]:
    """Plain headers are read here, long names and other rarities by `tarfile`."""
    content_end = 0
    while at < end:
        header = window.read(at, _BLOCK)
        if not header.strip(b"\0"):
            return
        if len(header) < _BLOCK:
            raise DamagedTar(f"the shard is cut short inside the header at byte {at}")
        if header[257:262] == b"ustar" and header[156:157] in b"0\0" and not header[124] & 0x80:
            member = _plain_member(header, at)
            regular = True
        else:
            member, regular = _rare_member(path, at)
        if regular:
            yield member
        content_end = member.offset + member.size
        at = member.offset + (member.size + _BLOCK - 1) // _BLOCK * _BLOCK
    if 0 < content_end <= end:  # else the last member is known to be cut
        raise DamagedTar("the shard has no end mark: it is cut short")


def _plain_member(header: bytes, at: int) -> Member:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:  # POSIX; GNU tar keeps other things there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    digits = header[124:136].strip(b" \0") or b"0"
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise DamagedTar(f"the header at byte {at} is damaged")
    size = int(digits, 8)
    return Member(name.decode(errors="replace"), at + _BLOCK, size)


def _rare_member(path: Path, at: int) -> tuple[Member, bool]:
    """The member at `at` and whether it is a regular file."""
    with path.open("rb") as file:
        if at == 0 and file.read(2) == b"\x1f\x8b":
            raise DamagedTar("the shard is compressed: unpack it with gunzip, as images gain nothing from it")
        file.seek(at)
        try:
            info = tarfile.TarFile(fileobj=file).next()
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DamagedTar(f"the header at byte {at} is damaged") from error
    if info is None or info.size < 0:
        raise DamagedTar(f"the header at byte {at} is damaged")
    name = info.name.encode(errors="surrogateescape").decode(errors="replace")
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    return Member(name, info.offset_data, info.size if has_data else 0), info.isreg()


@dataclass(slots=True)
class _Record:
    key: str
    offset: int = 0
    size: int = 0
    label: int = NO_LABEL
    flaw: str | None = "no image"
    extensions: tuple[str, ...] = ()


class _Collector:
    """Groups members into samples by key, wherever in the shard they stand."""

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._open: dict[str, _Record] = {}

    def add(self, member: Member, window: _Window) -> None:
        key, extension = _split(member.name)
        if not extension or _is_metadata(member.name):
            return
        record = self._record_for(key, extension)
        record.extensions += (extension,)
        if member.offset + member.size > window.total:
            record.flaw = "the shard is cut short inside this sample"
        elif extension in IMAGE_EXTENSIONS:
            self._set_image(record, member)
        elif extension in ("cls", "json") and member.size <= _LARGEST["text"]:
            _set_label(record, extension, window.read(member.offset, member.size))

    def _record_for(self, key: str, extension: str) -> _Record:
        record = self._open.get(key)
        if record is None or extension in record.extensions:
            duplicate = record is not None
            record = _Record(key, flaw="a second sample with the same key" if duplicate else "no image")
            self._records.append(record)
            self._open[key] = record
        return record

    def _set_image(self, record: _Record, member: Member) -> None:
        if record.size or record.flaw not in (None, "no image"):
            return
        record.offset, record.size = member.offset, min(member.size, _LARGEST["image"])
        record.flaw = None
        if member.size == 0:
            record.flaw = "the image is empty"
        elif member.size > _LARGEST["image"]:
            record.flaw = "the image is larger than 4 GiB"

    def damage(self, why: str) -> None:
        self._records.append(_Record("", flaw=why))

    def pack(self, shard_bytes: int) -> bytes:
        """The content of the index file."""
        records = self._records or [_Record("", flaw="the shard is empty")]
        reasons = sorted({record.flaw for record in records if record.flaw is not None})
        number = {reason: position + 1 for position, reason in enumerate(reasons)}
        entries, keys, key_end = bytearray(), [], 0
        for record in records:
            key = record.key.encode()
            keys.append(key)
            key_end += len(key)
            flaw = number[record.flaw] if record.flaw is not None else 0
            entries += _ENTRY.pack(record.offset, record.size, record.label, key_end, flaw)
        reason_bytes = json.dumps(reasons).encode() if reasons else b""
        header = _HEADER.pack(_MAGIC, len(records), shard_bytes, key_end, len(reason_bytes))
        return b"".join((header, entries, *keys, reason_bytes))


def _split(name: str) -> tuple[str, str]:
    """`a/b.c.JPG` -> (`a/b`, `c.jpg`): as webdataset does, the extension starts at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _is_metadata(name: str) -> bool:
    first = name.partition("/")[0]
    return len(first) > 4 and first.startswith("__") and first.endswith("__")


def _set_label(record: _Record, extension: str, content: bytes) -> None:
    """A `.cls` wins over a `.json`. What is no label (a name, or the -1 of unlabelled sets) leaves the sample without:
    pretraining needs none."""
    if extension == "json" and "cls" in record.extensions:
        return
    try:
        value = content if extension == "cls" else _json_label(content)
        label = int(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return
    if 0 <= label <= _LARGEST["label"]:
        record.label = label


def _json_label(content: bytes) -> Any:
    fields = json.loads(content)
    return fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
