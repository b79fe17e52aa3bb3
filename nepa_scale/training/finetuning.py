"""Fine-tuning to classes as the loop sees it: a classifier around a pretrained backbone, and its learning rates.

The recipe is that of the released scripts: rates that fall from the last block to the first, a warmup that is longer
the earlier the block, a fixed rate for what follows the blocks, and patch weights that stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nepa_scale.config import Config, ConfigError
from nepa_scale.data.batch import Batch, normalize
from nepa_scale.data.mixing import Mixing
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier, draw_rope_scale
from nepa_scale.sharding import ParameterGroup, Shard
from nepa_scale.training.optimization import decays, peak_learning_rate
from nepa_scale.training.pretrained import initialize_shards, load_backbone

_PATCHES = ("backbone.embedding.weight", "backbone.embedding.bias")


class Finetuning:
    """As `Pretraining`.

    classes: C, as the training shards state
    micro_batch_size: of each rank
    Raises:
        ConfigError: the shards have no labels, or the micro-batch is odd where images are to be mixed.
    """

    quality = "top1"

    def __init__(self, config: Config, classes: int | None, micro_batch_size: int) -> None:
        if classes is None:
            raise ConfigError(f"task=finetune needs labels, and the shards of data.train={config.data.train} have none")
        self.config, self.classes = config, classes
        self.architecture = resolve_architecture(config.model)
        self.mixing = Mixing(config.augment, classes, micro_batch_size)
        with torch.device("meta"):
            self.parameters = sum(parameter.numel() for parameter in self.build().parameters())

    def build(self) -> nn.Module:
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        finetune = self.config.finetune
        backbone = CausalViT(self.architecture, dtype)
        backbone.embedding.frozen = finetune.freeze_patches
        return Classifier(
            backbone,
            self.classes,
            pooling=finetune.pooling,
            causal=finetune.causal,
            label_smoothing=finetune.label_smoothing,
        )

    def initialize(self, shards: list[Shard]) -> None:
        """Writes the masters: the pretrained backbone, where one is given, and initial values. Collective."""
        initialize_shards(shards, self.architecture, self.config.train.seed)
        finetune = self.config.finetune
        if finetune.weights is not None:
            load_backbone(finetune.weights, shards, self.config.model, average=finetune.average)

    def groups(self, names: Sequence[str]) -> list[ParameterGroup]:
        finetune, peak = self.config.finetune, peak_learning_rate(self.config)
        factors = layer_factors(self.architecture.depth, finetune.layer_decay, finetune.layer_decay_kind)
        fixed = _PATCHES if finetune.freeze_patches else ()
        return finetuning_groups(names, factors, finetune.head_lr / peak, self.config.optimizer.weight_decay, fixed)

    def inputs(self, batch: Batch, step: int) -> dict[str, Any]:
        scale = draw_rope_scale(self.architecture.rope_rescale, self.config.train.seed, step)
        images, targets = self.mixing(normalize(batch.images, batch.flip), batch.labels, batch.host_keys)
        return {
            "images": images,
            "labels": targets,
            "sample_keys": batch.sample_keys,
            "rope_scale": torch.full((), scale, device=images.device),
        }

    def diagnostics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """How sure the classifier is: the mean of its largest probabilities."""
        return {"confidence": outputs["logits"].softmax(-1).amax(-1).mean()}


def layer_factors(depth: int, decay: float, kind: str) -> list[float]:
    """The factor on the learning rate of each block, the first block first; the last one's is 1.

    kind: "constant": each block's is `decay` times that of the next (the released scripts); "linear": evenly spaced
        from `decay` to 1 (the paper)
    """
    if kind == "constant":
        return [decay ** (depth - 1 - layer) for layer in range(depth)]
    return [decay + (1 - decay) * layer / max(depth - 1, 1) for layer in range(depth)]


def finetuning_groups(
    names: Sequence[str],
    factors: Sequence[float],
    head_factor: float,
    weight_decay: float,
    fixed: Sequence[str] = (),
) -> list[ParameterGroup]:
    """By name: the embedding with the first block, each block, and the head, each with and without weight decay.

    fixed: parameters whose gradients are zeros, and which must not decay either
    Block i warms up over (1 - its factor) of the warmup: the last one, and the head, start at their full rate.
    """
    groups = []
    labels = [*(f"block {layer}" for layer in range(len(factors))), "head"]
    for label, factor in zip(labels, [*factors, head_factor], strict=True):
        mine = [name for name in names if _label(name) == label]
        warmup = 0.0 if label == "head" else 1.0 - factor
        for decay, some in (
            (weight_decay, tuple(name for name in mine if decays(name) and name not in fixed)),
            (0.0, tuple(name for name in mine if not decays(name) or name in fixed)),
        ):
            if some:
                groups.append(ParameterGroup(some, decay, factor, warmup, label))
    return groups


def _label(name: str) -> str:
    """Which of `finetuning_groups` a parameter belongs to."""
    if name.startswith("backbone.blocks."):
        return f"block {name.split('.')[2]}"
    return "block 0" if name.startswith("backbone.embedding.") else "head"
