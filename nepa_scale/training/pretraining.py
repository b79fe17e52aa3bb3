"""Pretraining as the loop sees it: a module, its parameter groups, and the inputs of each step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nepa_scale.config import Config
from nepa_scale.data.batch import Batch, normalize
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.models.transfer import rate_factor
from nepa_scale.objectives import build_pretext, draw_rope_scale, pretext_diagnostics, spectrum_targets
from nepa_scale.sharding import ParameterGroup, Shard
from nepa_scale.training.optimization import pretraining_groups
from nepa_scale.training.pretrained import initialize_shards


class Pretraining:
    """See the module's docstring; `classification` offers the same for fine-tuning."""

    quality = "knn_top1"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.architecture = resolve_architecture(config.model, mask_token=config.objective.mask_ratio > 0)
        with torch.device("meta"):
            self.parameters = sum(parameter.numel() for parameter in self.build().parameters())

    def build(self) -> nn.Module:
        """The module with uninitialised parameters, on the default device."""
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        return build_pretext(CausalViT(self.architecture, dtype), self.config.objective)

    def initialize(self, shards: list[Shard]) -> None:
        """Writes the masters' initial values."""
        initialize_shards(shards, self.architecture, self.config.train.seed)

    def groups(self, names: Sequence[str]) -> list[ParameterGroup]:
        rate_of = partial(rate_factor, architecture=self.architecture)
        optimizer = self.config.optimizer
        return pretraining_groups(names, optimizer.weight_decay, rate_of, optimizer.weight_decay_end)

    def inputs(self, batch: Batch, step: int) -> dict[str, Any]:
        """Keyword arguments of the module for one micro-batch of update `step`; the batch is on the device."""
        scale = draw_rope_scale(self.architecture.rope_rescale, self.config.train.seed, step)
        return {
            "images": normalize(batch.images, batch.flip),
            "sample_keys": batch.sample_keys,
            "rope_scale": torch.full((), scale, device=batch.images.device),
        }

    def diagnostics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What to log beside the loss, from a micro-batch's outputs: scalars, of which the loop takes means."""
        return pretext_diagnostics(outputs, spectrum=False)

    def targets(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """Some of a micro-batch's targets, [rows, D], of which the effective rank is taken; None: there are none."""
        return spectrum_targets(outputs)
