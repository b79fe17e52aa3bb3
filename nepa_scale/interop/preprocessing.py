"""How a model wants its images prepared in evaluation, in the words of timm and of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nepa_scale.config import Config, DataConfig, EvaluateConfig

MEAN, STD = 0.5, 0.5  # of all three channels, after pixels are scaled to [0, 1]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, in which Hugging Face counts


@dataclass(frozen=True)
class Preprocessing:
    """Resize to int(size / crop_share), by the shorter side or, with squash, both sides; then the middle of `size`."""

    crop_share: float = EvaluateConfig.crop_share
    squash: bool = EvaluateConfig.squash
    interpolation: str = DataConfig.interpolation

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
            "mean": (MEAN,) * 3,
            "std": (STD,) * 3,
        }

    def for_hugging_face(self, size: tuple[int, int]) -> dict[str, Any]:
        """A `preprocessor_config.json` of its ViTImageProcessor, which resizes to `size` [height, width] and crops
        nothing; the crop is told in timm's words beside what it reads."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size[0], "width": size[1]},
            "resample": _RESAMPLE[self.interpolation],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [MEAN] * 3,
            "image_std": [STD] * 3,
            "crop_pct": self.crop_share,
            "crop_mode": "squash" if self.squash else "center",
        }

    @classmethod
    def from_hugging_face(cls, fields: dict[str, Any]) -> Preprocessing:
        """The same, read back; what is absent has this project's default."""
        names = {number: name for name, number in _RESAMPLE.items()}
        return cls(
            fields.get("crop_pct", cls.crop_share),
            fields.get("crop_mode") == "squash",
            names.get(fields.get("resample", _RESAMPLE[cls.interpolation]), cls.interpolation),
        )
