"""Image classification on a backbone: fine-tuning, and the classifiers of the official release.

Shapes: B images, T = 1 + patches tokens (CLS first), D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import ConfigError
from nepa_scale.models import CausalViT
from nepa_scale.models.layers import LayerNorm, Linear

POOLINGS = ("mean", "last")


class Classifier(nn.Module):
    """A backbone and a linear head: the module that the strategies shard and step when they fine-tune.

    classes: C
    pooling: "mean" averages the patches' outputs (not CLS) and normalises the average; "last" takes the last patch,
        which under causal attention is the one that has seen the whole image
    causal: whether attention stays causal, as in pretraining
    label_smoothing: share of the target spread over all classes

    Raises:
        ConfigError: no class, or an unknown pooling.
    """

    def __init__(
        self,
        backbone: CausalViT,
        classes: int,
        *,
        pooling: str = "mean",
        causal: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ConfigError(f"a classifier needs at least one class, not {classes}")
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling} is not one of {', '.join(POOLINGS)}")
        self.causal = causal
        self.label_smoothing = label_smoothing
        self.backbone = backbone
        width = backbone.architecture.width
        self.fc_norm = LayerNorm(width) if pooling == "mean" else None
        self.head = Linear(width, classes)

    @property
    def units(self) -> list[nn.Module]:
        """The submodules that are gathered, recomputed and compiled as one, in the order of the forward pass."""
        return [self.backbone.embedding, *self.backbone.blocks]

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        sample_keys: Tensor | None = None,
        rope_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Normalised images [B, 3, h, w] -> {"logits": float32 [B, C]} and, given labels, {"loss": float32 []}.

        labels: class indices int64 [B], or target probabilities [B, C] such as mixup makes
        sample_keys: int64 [B], whence drop path is drawn; None (evaluation): no drop path
        rope_scale: float32 [], factor on the coordinates of rotary position; None: 1
        """
        _, tokens = self.backbone(images, causal=self.causal, rope_scale=rope_scale, sample_keys=sample_keys)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.head(self._pool(tokens.float()))
            if labels is None:
                return {"logits": logits}
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "logits": logits}

    def _pool(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        return tokens[:, -1] if self.fc_norm is None else self.fc_norm(tokens[:, 1:].mean(dim=1))
