"""Part files of a checkpoint: safetensors of flat float32 ranges, with a checksum for each block of bytes.

Checksums are XXH3 (64 bits): they find damage, not malice, and a core makes them many times faster than a disk writes.
They are kept per block so that a reader verifies all that it reads and still reads no more than the blocks it needs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nepa_scale.sharding.shard import Shard
from nepa_scale.training.fault_injection import fault_point

BLOCK_BYTES = 256 << 10  # what a reader of a few bytes reads, and what a checksum costs in the index: 19 bytes
FLOAT_BYTES = 4
_FLUSH_BYTES = 32 << 20
_ALIGNMENT = 64  # of the first byte after the header


class Corrupt(Exception):
    """A file of a checkpoint is not what was written; the message names it."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, and the byte of the part file at which they begin."""

    kind: str
    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Part:
    """A part file, as its writer describes it."""

    file: str
    bytes: int
    checksums: list[str]  # of each block


def checksum(data: Any) -> str:
    """Of anything that has a buffer."""
    return xxhash.xxh3_64_hexdigest(data)


class PartImage:
    """One rank's part file, held in host memory byte for byte as it will be on disk.

    That makes it the buffer that a save copies to, reused by every save, and all that a save costs in memory.

    shards: what the rank holds
    share: (i, n) takes the i-th of n equal shares of every range: for state that all of n ranks hold
    """

    def __init__(self, shards: list[Shard], share: tuple[int, int] = (0, 1)) -> None:
        self._share = share
        self._layout = _layout(shards, share)
        held = [(f"{kind}/{name}/{start}", (stop - start,)) for kind, name, start, stop in self._layout if stop > start]
        header = safetensors_header(held)
        floats = sum(stop - start for _, _, start, stop in self._layout)
        self.pieces: list[Piece] = []
        offset = len(header)
        for kind, name, start, stop in self._layout:
            self.pieces.append(Piece(kind, name, start, stop, offset))
            offset += (stop - start) * FLOAT_BYTES
        on_device = any(tensor.is_cuda for shard in shards for tensor in shard.tensors.values())
        self._buffer = torch.empty(len(header) + floats * FLOAT_BYTES, dtype=torch.uint8, pin_memory=on_device)
        self._buffer.fill_(0)  # until written to, memory is only promised
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)

    def fits(self, shards: list[Shard], share: tuple[int, int]) -> bool:
        """Whether this image was laid out for such shards."""
        return self._layout == _layout(shards, share)

    @torch.no_grad()
    def copy_from(self, shards: list[Shard]) -> None:
        """Takes the present values; they are all here when it returns."""
        on_device = False
        for piece, (kind, shard) in zip(self.pieces, _held(shards), strict=True):
            source = shard.tensors[kind][piece.start - shard.start : piece.stop - shard.start]
            target = self._buffer[piece.offset : piece.offset + source.numel() * FLOAT_BYTES].view(torch.float32)
            target.copy_(source, non_blocking=True)
            on_device = on_device or source.is_cuda
        if on_device:
            torch.cuda.synchronize()

    def write(self, path: Path) -> Part:
        """Writes the file; it is on the disk when this returns. Raises OSError."""
        data = self._buffer.numpy().data
        checksums = []
        with path.open("wb", buffering=0) as file:
            fault_point("part-created")
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                checksums.append(checksum(block))
                while block:  # a write may stop short, at a limit or a full disk: the next one says why
                    block = block[os.write(file.fileno(), block) :]
                if start > 0 and start % _FLUSH_BYTES == 0:
                    _flush_soon(file.fileno(), start - _FLUSH_BYTES, start)
                if start <= len(data) // 2 < start + BLOCK_BYTES:
                    fault_point("part-half")
            fault_point("part-written")
            os.fsync(file.fileno())
        fault_point("part-synced")
        return Part(path.name, len(data), checksums)


def _flush_soon(file: int, start: int, stop: int) -> None:
    """Has the system begin to write these bytes to the disk now, rather than all of them at the fsync."""
    if hasattr(os, "posix_fadvise"):  # on Linux, saying that they are not needed in memory does it
        os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_DONTNEED)


def _held(shards: list[Shard]) -> Iterator[tuple[str, Shard]]:
    """(kind, shard) in the order of the file. All of one kind together: most readers of one want that kind alone."""
    for kind in dict.fromkeys(kind for shard in shards for kind in shard.tensors):
        for shard in shards:
            if kind in shard.tensors:
                yield kind, shard


def _layout(shards: list[Shard], share: tuple[int, int]) -> list[tuple[str, str, int, int]]:
    """(kind, name, start, stop) of what a part holds, in its order."""
    index, count = share
    layout = []
    for kind, shard in _held(shards):
        length = shard.stop - shard.start
        start, stop = shard.start + length * index // count, shard.start + length * (index + 1) // count
        layout.append((kind, shard.name, start, stop))
    return layout


def safetensors_header(tensors: Sequence[tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """What begins a safetensors file that holds these float32 tensors, one after the other; its length is a multiple
    of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name, shape in tensors:
        end = begin + math.prod(shape) * FLOAT_BYTES
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class PartReader:
    """Reads ranges of a part file, verifying each block that it touches.

    Fastest where ranges are asked for in the order of the file: the last block is kept.

    block_bytes: the size of the blocks that the part's checksums are of
    """

    def __init__(self, folder: Path, part: Part, block_bytes: int) -> None:
        self._part, self._block_bytes = part, block_bytes
        self._path = folder / part.file
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise Corrupt(f"{self._path} cannot be read: {error.strerror}") from error
        size = os.fstat(self._file.fileno()).st_size
        if size != part.bytes:
            self._file.close()
            raise Corrupt(f"{self._path} has {size} bytes, not {part.bytes}")
        self._buffer = torch.empty(min(block_bytes, part.bytes), dtype=torch.uint8)
        self._view = self._buffer.numpy().data
        self._held = -1

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @torch.no_grad()
    def read_into(self, target: Tensor, offset: int) -> None:
        """Fills `target`, float32 [n] on any device, with the floats from byte `offset` on. Raises Corrupt."""
        done, size = 0, target.numel() * FLOAT_BYTES
        while done < size:
            block, begin = divmod(offset + done, self._block_bytes)
            length = min(self._block_bytes - begin, size - done)
            self.verify(block)
            source = self._buffer[begin : begin + length].view(torch.float32)
            target[done // FLOAT_BYTES : (done + length) // FLOAT_BYTES].copy_(source)
            done += length

    def verify(self, block: int) -> None:
        """Reads the block and compares its checksum. Raises Corrupt."""
        if block == self._held:
            return
        self._held = -1
        begin = block * self._block_bytes
        view = self._view[: min(self._block_bytes, self._part.bytes - begin)]
        read = 0
        try:
            while read < len(view) and (got := os.preadv(self._file.fileno(), [view[read:]], begin + read)):
                read += got
        except OSError as error:
            raise Corrupt(f"{self._path} cannot be read at byte {begin + read}: {error.strerror}") from error
        if read < len(view) or checksum(view) != self._part.checksums[block]:
            raise Corrupt(f"{self._path} is damaged between bytes {begin} and {begin + len(view)} (checksum)")
        self._held = block
