"""How a model wants its images prepared in evaluation, in the words of timm and of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import Config, ConfigError, DataConfig, EvaluateConfig

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)  # what this project normalises with
_RESAMPLE = (
    "nearest",
    "lanczos",
    "bilinear",
    "bicubic",
    "box",
    "hamming",
)  # by Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resize to int(size / crop_share), by the shorter side or, with squash, both sides; then the middle of `size`.

    mean, std: of the channels, after pixels are scaled to [0, 1]
    """

    crop_share: float = EvaluateConfig.crop_share
    squash: bool = EvaluateConfig.squash
    interpolation: str = DataConfig.interpolation
    mean: Channels = HALF
    std: Channels = HALF

    @classmethod
    def of(cls, config: Config) -> Preprocessing:
        """That with which a run evaluates."""
        return cls(config.evaluate.crop_share, config.evaluate.squash, config.data.interpolation)

    def for_timm(self) -> dict[str, Any]:
        """Fields of timm's `pretrained_cfg`."""
        return {
            "crop_pct": self.crop_share,
            "crop_mode": "squash" if self.squash else "center",
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }

    def for_hugging_face(self, size: tuple[int, int]) -> dict[str, Any]:
        """A `preprocessor_config.json` of its ViTImageProcessor, which resizes to `size` [height, width] and crops
        nothing; the crop is told in timm's words beside what it reads."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size[0], "width": size[1]},
            "resample": _RESAMPLE.index(self.interpolation),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "crop_pct": self.crop_share,
            "crop_mode": "squash" if self.squash else "center",
        }

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """The same, read back; what is absent has this project's default.

        Raises:
            ConfigError: a field is not what it is to be.
        """
        try:
            mean, std = (tuple(map(float, fields.get(name, HALF))) for name in ("image_mean", "image_std"))
            if len(mean) != 3 or len(std) != 3:
                raise ValueError("image_mean and image_std have a number for each of three channels")
            resample = fields.get("resample")
            interpolation = cls.interpolation if resample is None else _RESAMPLE[int(resample)]
            share = float(fields.get("crop_pct", cls.crop_share))
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"preprocessor_config.json cannot be understood: {error}") from error
        return cls(share, fields.get("crop_mode") == "squash", interpolation, mean, std)
