"""`dataset.json`: what a set of shards holds, written beside them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from nepa_scale.config import ConfigError

FILE_NAME = "dataset.json"


@dataclass(frozen=True)
class ShardDescription:
    """One shard: its file name, and the number of samples, bytes and the SHA-256 (hex) of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """A set of shards; `class_names[label]` is the class's name in the input (ImageNet: the synset)."""

    shards: list[ShardDescription]
    classes: int | None
    class_names: list[str] | None
    recipe: dict[str, Any] = field(default_factory=dict)  # how the shards were made
    left_out: list[list[str]] = field(default_factory=list)  # [key, why] of images that could not be used

    def to_json(self) -> str:
        """The content of `dataset.json`; equal descriptions give equal bytes."""
        totals = {"samples": sum(s.samples for s in self.shards), "bytes": sum(s.bytes for s in self.shards)}
        return json.dumps(totals | dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes, where: str) -> Description:
        """Raises ConfigError, naming `where`, for anything but what `to_json` writes."""
        try:
            fields = json.loads(content)
            shards = [ShardDescription(s["name"], s["samples"], s["bytes"], s["sha256"]) for s in fields["shards"]]
            counts = [number for shard in shards for number in (shard.samples, shard.bytes)]
            if not all(isinstance(number, int) and number >= 0 for number in counts):
                raise TypeError("counts are not whole numbers")
            if not all(shard.name and "/" not in shard.name for shard in shards):
                raise ValueError("a shard's name is not a file name")
            names = fields.get("class_names")
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise TypeError("class_names is not a list of names")
            return cls(
                shards,
                fields.get("classes"),
                names,
                fields.get("recipe", {}),
                fields.get("left_out", []),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{where} does not describe shards ({error}): remove it, or make the shards again with "
                "tools/make_shards.py"
            ) from error
