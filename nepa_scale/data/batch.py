"""What the stream hands to the training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEAN, STD = 0.5, 0.5  # the released processor's, for all three channels


@dataclass
class Batch:
    """One micro-batch of one rank, on the host until `to_device`.

    images: uint8 [B, 3, H, W], cropped and resized, not yet flipped
    flip: bool [B], which images are to be mirrored
    labels: int64 [B], -1 where the sample has none
    sample_keys: int64 [B], the hash of (seed, epoch, sample) from which masks and drop paths are drawn
    keys: the samples' names in their shards
    """

    images: Tensor
    flip: Tensor
    labels: Tensor
    sample_keys: Tensor
    keys: list[str]

    def to_device(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""
        images, flip, labels, sample_keys = (
            tensor.to(device, non_blocking=True) for tensor in (self.images, self.flip, self.labels, self.sample_keys)
        )
        return Batch(images, flip, labels, sample_keys, self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        images, flip, labels, sample_keys = (
            tensor.pin_memory() for tensor in (self.images, self.flip, self.labels, self.sample_keys)
        )
        return Batch(images, flip, labels, sample_keys, self.keys)


def normalize(images: Tensor, flip: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] and bool [B] -> float32 [B, 3, H, W] in [-1, 1], mirrored where `flip` says so."""
    mirrored = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return (mirrored.to(torch.float32) / 255.0 - MEAN) / STD
