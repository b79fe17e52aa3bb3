"""Fine-tuning to classes as the loop sees it: a classifier around a pretrained backbone, and its learning rates.

The recipe is that of the released scripts: rates that fall from the last block to the first and on to the embedding, a
warmup that is longer the earlier the block, a fixed rate for the last norm and the classifier, which starts as zeros,
and patch weights that stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nepa_scale.config import Config, ConfigError
from nepa_scale.data.batch import Batch, normalize
from nepa_scale.data.mixing import Mixing
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier, draw_rope_scale
from nepa_scale.sharding import ParameterGroup, Shard
from nepa_scale.training.optimization import decays
from nepa_scale.training.pretrained import initialize_shards, load_backbone
from nepa_scale.training.schedule import peak_learning_rate

_CLASSIFIER = "head."
_PATCHES = ("backbone.embedding.weight", "backbone.embedding.bias")


class Finetuning:
    """As `Pretraining`.

    classes: C, as the training shards state
    micro_batch_size: of each rank
    Raises:
        ConfigError: the shards have no labels, the learning rate is 0, or the micro-batch is odd where images are to be
            mixed.
    """

    quality = "top1"

    def __init__(self, config: Config, classes: int | None, micro_batch_size: int) -> None:
        if classes is None:
            raise ConfigError(f"task=finetune needs labels, and the shards of data.train={config.data.train} have none")
        self.config, self.classes = config, classes
        if peak_learning_rate(config) == 0:
            raise ConfigError(
                "the peak learning rate is 0: to train a classifier on features as they are, use tools/evaluate.py"
            )
        self.architecture = resolve_architecture(config.model)
        self.mixing = Mixing(config.augment, classes, micro_batch_size, config.train.seed)
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
        """Writes the masters: the pretrained backbone, where one is given, initial values, a classifier of zeros.
        Collective."""
        initialize_shards(shards, self.architecture, self.config.train.seed)
        for shard in shards:
            if shard.name.startswith(_CLASSIFIER):
                shard.tensors["master"].zero_()
        finetune = self.config.finetune
        if finetune.weights is not None:
            origin = load_backbone(finetune.weights, shards, self.config.model, average=finetune.average)
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"starts from {origin}", flush=True)

    def groups(self, names: Sequence[str]) -> list[ParameterGroup]:
        finetune, optimizer, peak = self.config.finetune, self.config.optimizer, peak_learning_rate(self.config)
        factors = layer_factors(self.architecture.depth, finetune.layer_decay, finetune.layer_decay_kind)
        fixed = _PATCHES if finetune.freeze_patches else ()
        return finetuning_groups(
            names, factors, finetune.head_lr / peak, optimizer.weight_decay, fixed, optimizer.weight_decay_end
        )

    def inputs(self, batch: Batch, step: int) -> dict[str, Any]:
        scale = draw_rope_scale(self.architecture.rope_rescale, self.config.train.seed, step)
        images, targets = self.mixing(normalize(batch.images, batch.flip), batch.labels, batch.host_keys, step)
        return {
            "images": images,
            "labels": targets,
            "sample_keys": batch.sample_keys,
            "rope_scale": torch.full((), scale, device=images.device),
        }

    def diagnostics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """How sure the classifier is: the mean of its largest probabilities."""
        return {"confidence": outputs["logits"].softmax(-1).amax(-1).mean()}

    def targets(self, outputs: dict[str, Tensor]) -> None:
        """Classes have no spectrum."""


def layer_factors(depth: int, decay: float, kind: str) -> list[float]:
    """The factor on the learning rate of the embedding and of each block, the last one's being 1: depth + 1 of them.

    kind: "constant": each block's is `decay` times that of the next, and the embedding's `decay` times that of the
        first (the released scripts); "linear": the blocks' are evenly spaced from `decay` to 1 (the paper), and the
        embedding's is the first block's
    """
    if kind == "constant":
        return [decay ** (depth - layer) for layer in range(depth + 1)]
    blocks = [decay + (1 - decay) * layer / max(depth - 1, 1) for layer in range(depth)]
    return [blocks[0], *blocks]


def finetuning_groups(
    names: Sequence[str],
    factors: Sequence[float],
    head_factor: float,
    weight_decay: float,
    fixed: Sequence[str] = (),
    weight_decay_end: float | None = None,
) -> list[ParameterGroup]:
    """By name: what is frozen, the embedding, each block, the norm of what is pooled, and the head (the backbone's last
    norm and the classifier), each with and without weight decay.

    factors: of `layer_factors`
    fixed: parameters whose gradients are zeros, and which must not decay either
    weight_decay_end: see `pretraining_groups`
    Where layers differ, each warms up over (1 - its factor) of the warmup: the last block, the norm and the head over
    the one step that `Schedule.warmup_of` leaves them. Where all are alike (layer decay 1), all warm up over the whole.
    """
    blocks = {f"block {layer}": factor for layer, factor in enumerate(factors[1:])}
    rates = {"frozen": 0.0, "embedding": factors[0], **blocks, "pooled norm": 1.0, "head": head_factor}
    alike = min(factors) == 1.0
    members: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        label = "frozen" if name in fixed else _label(name)
        members.setdefault((label, decays(name) and name not in fixed), []).append(name)
    groups = []
    for label, rate in rates.items():
        warmup = 1.0 if alike else 1.0 - (rate if label in ("embedding", *blocks) else 1.0)
        for decaying in (True, False):
            if some := members.get((label, decaying)):
                start, end = (weight_decay, weight_decay_end) if decaying else (0.0, None)
                groups.append(ParameterGroup(tuple(some), start, rate, warmup, label, end))
    return groups


def _label(name: str) -> str:
    """Which of `finetuning_groups` a parameter belongs to."""
    if name.startswith("backbone.blocks."):
        return f"block {name.split('.')[2]}"
    if name.startswith("backbone.embedding."):
        return "embedding"
    return "pooled norm" if name.startswith("fc_norm.") else "head"
