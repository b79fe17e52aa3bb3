"""Random erasing, mixup and cutmix of a batch on its device, as timm has them.

Neighbours in a micro-batch are mixed with each other (timm: the first with the last, and so on), so that a sample's
partner is the same for any number of ranks and any even micro-batch. Mixup or cutmix, its share and its box are drawn
once a step for the whole global batch (mode "batch"; timm's, in which each process draws for its own batch), a pure
function of the seed and the step; or for each pair (mode "pair"), of the samples' keys. What is erased is a pure
function of the sample's key.

Sources: random erasing, Zhong et al., arXiv 1708.04896; mixup, Zhang et al., arXiv 1710.09412; cutmix, Yun et al.,
arXiv 1905.04899. The order of the draws and the constants are those of timm's RandomErasing and Mixup.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nepa_scale.config import AugmentConfig, ConfigError
from nepa_scale.counter_random import hash_array

Numbers = NDArray[np.float64]
Keys = NDArray[np.int64]
Boxes = NDArray[np.int64]  # [N, 4]: top, bottom, left, right; the bottom row and the right column are outside
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of the image; height to width
ATTEMPTS = 10  # to place a box to be erased


class Mixing:
    """Erases, then mixes. Draws on the host and works on the device, without waiting for it.

    classes: C
    seed: of the run; what is drawn for a batch depends on it
    Raises:
        ConfigError: images are to be mixed in micro-batches of an odd number.
    """

    def __init__(self, config: AugmentConfig, classes: int, micro_batch_size: int, seed: int) -> None:
        self.config, self.classes, self.seed = config, classes, seed
        self.mixes = config.mixup > 0 or config.cutmix > 0
        if self.mixes and micro_batch_size % 2:
            raise ConfigError(
                f"augment.mixup and augment.cutmix mix pairs of images, but the micro-batch holds {micro_batch_size}: "
                "set an even train.micro_batch_size"
            )
        self._noise: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor, keys: Keys, step: int) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] and labels int64 [B] -> images and targets, float32 [B, C].

        keys: int64 [B], the samples' keys, on the host
        step: the update to which the micro-batch belongs
        """
        height, width = images.shape[-2:]
        if self.config.erase > 0:
            chosen = draw_erased(keys, height, width, self.config.erase)
            images = torch.where(_inside(chosen, images), self._noise_for(images, keys), images)
        targets = F.one_hot(labels, self.classes).float()
        if not self.mixes:
            return images, targets
        boxes, shares = draw_mixes(self._mixed_alike(keys, step), height, width, self.config)
        own = torch.from_numpy(shares).to(images.device, torch.float32)
        partners, share = _partners(images), own[:, None, None, None]
        blended = images * share + partners * (1 - share)
        cut = torch.from_numpy((boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])).to(images.device)
        pasted = torch.where(_inside(boxes, images), partners, images)
        # a cutmix whose box is empty has the share 1, and so blends to the image itself
        images = torch.where(cut[:, None, None, None], pasted, blended)
        return images, targets * own[:, None] + _partners(targets) * (1 - own[:, None])

    def _mixed_alike(self, keys: Keys, step: int) -> Keys:
        """[B], equal for images that are mixed in the same way: the pairs, or all."""
        if self.config.mix_mode == "batch":
            return np.broadcast_to(hash_array(np.array([step]), "mixed batch", self.seed), keys.shape)
        return np.repeat(hash_array(keys[0::2] ^ keys[1::2], "pair"), 2)

    def _noise_for(self, images: Tensor, keys: Keys) -> Tensor:
        """Normal noise, [B, 3, H, W]: windows of one field, each at its sample's place."""
        height, width = images.shape[-2:]
        if self._noise is None or self._noise.device != images.device or self._noise.shape[1] != 2 * height:
            generator = torch.Generator().manual_seed(0)
            self._noise = torch.randn(3, 2 * height, 2 * width, generator=generator).to(images.device)
        places = (_uniforms(keys, 2, "noise") * (height, width)).astype(np.int64)
        corner = torch.from_numpy(places).to(images.device)
        rows = corner[:, 0, None] + torch.arange(height, device=images.device)
        columns = corner[:, 1, None] + torch.arange(width, device=images.device)
        return self._noise[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def draw_erased(keys: Keys, height: int, width: int, probability: float) -> Boxes:
    """The box that each image loses, [B, 4]; empty with probability 1 - `probability`."""
    boxes = np.zeros((len(keys), 4), dtype=np.int64)
    todo = _uniforms(keys, 1, "erase")[:, 0] < probability
    low, high = math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])
    for attempt in range(ATTEMPTS):
        draws = _uniforms(keys, 4, "erased box", attempt)
        area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws[:, 0])
        aspect = np.exp(low + (high - low) * draws[:, 1])
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = todo & (tall < height) & (wide < width)
        top, left = np.floor(draws[:, 2] * (height - tall + 1)), np.floor(draws[:, 3] * (width - wide + 1))
        boxes[fits] = np.stack([top, top + tall, left, left + wide], axis=1)[fits].astype(np.int64)
        todo &= ~fits
    return boxes


def draw_mixes(alike: Keys, height: int, width: int, config: AugmentConfig) -> tuple[Boxes, Numbers]:
    """What each image takes from its neighbour: the box that is pasted [B, 4], empty for mixup, and its own share [B].

    alike: int64 [B]; images for which it is equal take the same box and keep the same share
    """
    distinct, places = np.unique(alike, return_inverse=True)
    draws = _uniforms(distinct, 3, "mix")
    cuts = (
        (draws[:, 0] < config.switch)
        if config.mixup > 0 and config.cutmix > 0
        else np.full(len(distinct), config.cutmix > 0)
    )
    shares = np.array(
        [_beta(config.cutmix if cut else config.mixup, int(key)) for cut, key in zip(cuts, distinct, strict=True)]
    )
    side = np.sqrt(1 - shares)
    tall, wide = (height * side).astype(np.int64), (width * side).astype(np.int64)
    y, x = (draws[:, 1] * height).astype(np.int64), (draws[:, 2] * width).astype(np.int64)
    top, bottom = np.clip(y - tall // 2, 0, height), np.clip(y + (tall + 1) // 2, 0, height)
    left, right = np.clip(x - wide // 2, 0, width), np.clip(x + (wide + 1) // 2, 0, width)
    boxes = np.where(cuts[:, None], np.stack([top, bottom, left, right], axis=1), 0)
    # what the image's edge cuts off the box is not the neighbour's
    shares = np.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), shares)
    return boxes[places], shares[places]


def _beta(alpha: float, key: int) -> float:
    return float(np.random.default_rng(key & (2**64 - 1)).beta(alpha, alpha))


def _uniforms(keys: Keys, count: int, *words: int | str) -> Numbers:
    """[N, count] numbers in [0, 1)."""
    hashes = np.stack([hash_array(keys, *words, number) for number in range(count)], axis=1)
    return (hashes.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _partners(values: Tensor) -> Tensor:
    """Each row's neighbour: rows 0 and 1, 2 and 3, ... change places."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(boxes: Boxes, images: Tensor) -> Tensor:
    """bool [B, 1, H, W]: the pixels of each image that lie in its box."""
    top, bottom, left, right = torch.from_numpy(boxes).to(images.device)[:, :, None, None].unbind(1)
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)[None, :]
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right)).unsqueeze(1)
