"""timm's RandAugment as a pure function of the image and the sample's key."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_words
from nepa_scale.data.batch import MEAN

if TYPE_CHECKING:
    from timm.data.auto_augment import RandAugment as TimmRandAugment


class RandAugment:
    """Picklable; timm is loaded at the first image, by the process that needs it.

    policy: in timm's notation, such as "rand-m9-mstd0.5-inc1"
    size: height and width of the images
    interpolation: "bilinear" or "bicubic", of rotations, shears and translations
    Raises:
        ConfigError: timm does not know the policy.
    """

    def __init__(self, policy: str, size: tuple[int, int], interpolation: str) -> None:
        self.policy, self.size, self.interpolation = policy, size, interpolation
        self._operations: TimmRandAugment | None = None
        self._load()

    def __call__(self, image: Tensor, key: int) -> None:
        """Changes `image`, uint8 [H, W, 3], in place.

        timm draws from the process-wide generators of Python and numpy: they are set to the key before, and put back
        after, so that nothing else in the process is affected.
        """
        if self._operations is None:
            self._operations = self._load()
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(hash_words("augment", key))
        np.random.seed(hash_words("augment", key) & 0xFFFFFFFF)
        try:
            changed = self._operations(Image.fromarray(image.numpy()))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        image.copy_(torch.from_numpy(np.array(changed)))

    def _load(self) -> TimmRandAugment:
        from timm.data.auto_augment import rand_augment_transform

        options: dict[str, Any] = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": (round(255 * MEAN),) * 3,  # fills what rotations and shears leave empty
            "interpolation": Image.Resampling[self.interpolation.upper()],
        }
        try:
            return rand_augment_transform(self.policy, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise ConfigError(
                f"augment.rand_augment={self.policy} is not a policy of timm's RandAugment; rand-m9-mstd0.5-inc1 is one"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operations": None}
