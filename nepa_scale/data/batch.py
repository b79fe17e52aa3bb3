"""What the stream hands to the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nepa_scale.data.shard_set import BadSample

MEAN, STD = 0.5, 0.5  # the released processor's, for all three channels


@dataclass
class Batch:
    """One micro-batch of one rank, on the host until `to_device`.

    images: uint8 [B, 3, H, W] (channels last in memory), cropped and resized, not yet flipped
    flip: bool [B], which images are to be mirrored
    labels: int64 [B], -1 where the sample has none
    sample_keys: int64 [B], the hash of (seed, epoch, sample) from which masks and drop paths are drawn
    samples: int64 [B], the samples' numbers in their shard set; -1: padding of an evaluation's last batch
    host_keys: `sample_keys` as an array that stays on the host
    keys: the samples' names in their shards
    bad: samples that could not be used and were replaced
    """

    images: Tensor
    flip: Tensor
    labels: Tensor
    sample_keys: Tensor
    samples: Tensor
    host_keys: NDArray[np.int64]
    keys: list[str]
    bad: list[BadSample] = field(default_factory=list)

    def to_device(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: function(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed)


def normalize(images: Tensor, flip: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] and bool [B] -> float32 [B, 3, H, W] in [-1, 1], mirrored where `flip` says so."""
    mirrored = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return mirrored.to(torch.float32).div_(255.0).sub_(MEAN).div_(STD)


def transferred(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`. A GPU receives each, from pinned memory, while it computes on the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to_device(device)
        return
    side = torch.cuda.Stream(device)

    def send() -> Batch | None:
        host = next(batches, None)
        if host is None:
            return None
        with torch.cuda.stream(side):
            return host.pin_memory().to_device(device)

    upcoming = send()
    while upcoming is not None:
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(side)
        batch = upcoming
        for tensor in (batch.images, batch.flip, batch.labels, batch.sample_keys, batch.samples):
            tensor.record_stream(compute)  # its memory was allocated on the other stream
        upcoming = send()
        yield batch
