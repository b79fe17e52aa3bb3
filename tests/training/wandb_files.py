"""The history in wandb's own files: records of protocol buffers in the log format of LevelDB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, LAST = 1, 4


def offline_runs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each offline run under a run folder, by its folder's name."""
    return {
        path.parent.name: list(_rows(path.read_bytes())) for path in run.glob("wandb/offline-run-*/run-*.wandb")
    }  # fmt: skip


def _rows(content: bytes) -> Iterator[dict[str, Any]]:
    for record in _records(content):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        if message.WhichOneof("record_type") == "history":
            yield {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in message.history.item}


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:  # padding at the end of a block
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
