"""What there is to put into shards, listed before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """An image in the input: `size` bytes at `offset` of `file`; `label` is None where there is none."""

    key: str
    file: str
    offset: int
    size: int
    label: int | None

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: it cannot be read, or the file has become shorter since it was listed.
        """
        with open(self.file, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise OSError(f"{self.file} has become shorter")
        return content


@dataclass
class Listing:
    """All images of an input in a fixed order, its classes, and what was left out: (key, why)."""

    items: list[Item]
    class_names: list[str] | None
    classes: int | None
    left_out: list[tuple[str, str]] = field(default_factory=list)


def safe_key(name: str) -> str:
    """`name`, a path without extension, as a sample's key: a dot in its last part would begin the extension."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.replace(".", "_")


def with_unique_keys(items: Iterable[Item]) -> list[Item]:
    """The items in order; the second of two with one key gets the key `...-2`, and so on."""
    taken: set[str] = set()
    unique = []
    for item in items:
        key, number = item.key, 1
        while key in taken:
            number += 1
            key = f"{item.key}-{number}"
        taken.add(key)
        unique.append(item if number == 1 else item._replace(key=key))
    return unique


def relative_key(path: Path, root: Path) -> str:
    """The key of the image at `path` in an input whose folder is `root`."""
    return safe_key(path.relative_to(root).with_suffix("").as_posix())
