"""Next-embedding prediction (arXiv 2512.16922, section 3): negative cosine, shifted by one, target under stop-gradient.

Shapes: B images, T = 1 + patches tokens (CLS first), D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import ConfigError, ObjectiveConfig
from nepa_scale.counter_random import hash_uniform, uniform
from nepa_scale.models import CausalViT


def next_embedding_loss(
    embeddings: Tensor, predictions: Tensor, *, shift: bool = True, stop_gradient: bool = True
) -> Tensor:
    """Mean negative cosine between predictions and target embeddings, a float32 scalar.

    embeddings, predictions: [B, T, D] of any floating dtype; the cosine is computed in float32 whatever the dtype and
        whatever autocast says, since bf16 arithmetic moves a true -0.9947 to -0.9961
    shift: position t predicts the embedding at t + 1, so that CLS is never a target and the last prediction is unused;
        without it each patch predicts its own embedding (the paper's ablation, which collapses to copying)
    stop_gradient: no gradient into the targets
    """
    if shift:
        embeddings, predictions = embeddings[:, 1:], predictions[:, :-1]
    else:
        embeddings, predictions = embeddings[:, 1:], predictions[:, 1:]
    if stop_gradient:
        embeddings = embeddings.detach()
    with torch.autocast(predictions.device.type, enabled=False):
        if predictions.dtype == torch.float32 or embeddings.requires_grad:
            return -F.cosine_similarity(predictions.float(), embeddings.float(), dim=-1).mean()
        loss: Tensor = _ReducedPrecisionLoss.apply(predictions, embeddings)
        return loss


class _ReducedPrecisionLoss(torch.autograd.Function):
    """The mean negative cosine of bf16 vectors, computed in float32 without float32 copies of all of them.

    The backward pass begins here, when most is in memory: a few images at a time are cast, forward and backward. The
    gradient is -(t / |p||t| - cos p / |p|^2) / n.
    """

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(predictions, targets)
        total = torch.zeros((), device=predictions.device)
        for some in zip(predictions.split(IMAGES_AT_A_TIME), targets.split(IMAGES_AT_A_TIME), strict=True):
            (p, _), (t, _) = map(_directions, some)
            total -= (p * t).sum()
        return total / predictions[..., 0].numel()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        predictions, targets = ctx.saved_tensors
        gradient = torch.empty_like(predictions, memory_format=torch.contiguous_format)
        each = upstream / predictions[..., 0].numel()
        for *some, result in zip(*(x.split(IMAGES_AT_A_TIME) for x in (predictions, targets, gradient)), strict=True):
            (p, length), (t, _) = map(_directions, some)
            cosine = (p * t).sum(-1, keepdim=True)
            result.copy_(p.mul_(cosine).sub_(t).mul_(each / length))
        return gradient, None


def _directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> in float32 the vectors' directions [..., D], and lengths [..., 1], which are at least `_EPS`."""
    x = vectors.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_EPS)
    return x / length, length


IMAGES_AT_A_TIME = 32
_EPS = 1e-8  # as in F.cosine_similarity


def random_mask(sample_keys: Tensor, patches: int, ratio: float) -> Tensor:
    """Masks exactly round(ratio * patches) patches of each image: bool [B, patches], a pure function of the keys."""
    scores = uniform(sample_keys, "mask", count=patches)
    masked = round(ratio * patches)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)  # stable: equal scores have one order on every device
    return ranks < masked


def draw_rope_scale(rescale: float, *words: int | str) -> float:
    """The training factor on rotary coordinates: log-uniform in [1/rescale, rescale], a pure function of `words`."""
    return rescale ** (2.0 * hash_uniform("rope", *words) - 1.0)


class NextEmbedding(nn.Module):
    """A backbone and its pretraining objective: the module that the strategies shard and step.

    Raises:
        ConfigError: the objective masks, but the backbone has no mask token.
    """

    def __init__(self, backbone: CausalViT, objective: ObjectiveConfig) -> None:
        super().__init__()
        if objective.mask_ratio > 0 and backbone.mask_token is None:
            raise ConfigError(
                f"objective.mask_ratio={objective.mask_ratio} needs a backbone with a mask token: "
                "build it with resolve_architecture(..., mask_token=True)"
            )
        self.backbone = backbone
        self.objective = objective

    @property
    def units(self) -> list[nn.Module]:
        """The submodules that are gathered, recomputed and compiled as one, in the order of the forward pass."""
        return [self.backbone.embedding, *self.backbone.blocks]

    def forward(
        self, images: Tensor, *, sample_keys: Tensor | None = None, rope_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised images [B, 3, h, w] -> {"loss": float32 [], "embeddings": [B, T, D], "predictions": [B, T, D]}.

        sample_keys: int64 [B], whence masks and drop path are drawn; None (evaluation): neither
        rope_scale: float32 [], see `draw_rope_scale`; None (evaluation): 1
        """
        o = self.objective
        mask = None
        if o.mask_ratio > 0 and sample_keys is not None:
            patch = self.backbone.architecture.patch_size
            mask = random_mask(sample_keys, (images.shape[2] // patch) * (images.shape[3] // patch), o.mask_ratio)
        embeddings, predictions = self.backbone(
            images, causal=o.causal, rope_scale=rope_scale, mask=mask, sample_keys=sample_keys
        )
        loss = next_embedding_loss(embeddings, predictions, shift=o.shift, stop_gradient=o.stop_gradient)
        return {"loss": loss, "embeddings": embeddings, "predictions": predictions}
