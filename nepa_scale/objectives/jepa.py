"""Joint-embedding prediction, I-JEPA (Assran et al. 2023, arXiv 2301.08243, section 3).

From the patches of a context block, the encoder and a narrow predictor tell a teacher's outputs at four target blocks.
The teacher is the moving average of the encoder's own weights and sees the whole image; its outputs are normalised over
their width, without weights. The paper's text gives the loss as the mean squared distance; the official code computes
the smooth-L1 loss (quadratic below a difference of 1, linear above), and so does this.

Shapes: B images, T = 1 + N tokens (CLS first), K patches of the context, M of a target block, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import Architecture, CausalViT
from nepa_scale.models.selection import select
from nepa_scale.objectives.blocks import blocks_of, draw_blocks
from nepa_scale.objectives.decoder import Decoder, decoder_architecture

SHARE, MOST = 1 / 2, (384, 12)  # of the encoder's width and depth: the paper's predictors beside ViT-B, L and H
ROTARY = 4  # what must divide the width of a head


def jepa_predictor(encoder: Architecture, objective: ObjectiveConfig) -> Architecture:
    """The predictor's shape; it has as many heads as the encoder, as in the official code. Raises ConfigError as
    `decoder_architecture` does."""
    unit = ROTARY * encoder.heads
    return decoder_architecture(encoder, "jepa", objective.jepa.width, objective.jepa.depth, SHARE, MOST, unit=unit)


class JointEmbedding(nn.Module):
    """A backbone, which sees the context only, and a predictor: the module that the strategies shard and step.

    Raises:
        ConfigError: see `jepa_predictor`, `blocks_of`.
    """

    def __init__(self, backbone: CausalViT, objective: ObjectiveConfig) -> None:
        super().__init__()
        a = backbone.architecture
        self.layout = blocks_of(a.grid)
        self.objective = objective
        self.backbone = backbone
        self.predictor = Decoder(a, jepa_predictor(a, objective), a.width, backbone.dtype)

    @property
    def units(self) -> list[nn.Module]:
        """The submodules that are gathered, recomputed and compiled as one, in the order of the forward pass."""
        return [self.backbone.embedding, *self.backbone.blocks, *self.predictor.blocks]

    def forward(
        self,
        images: Tensor,
        *,
        sample_keys: Tensor | None = None,
        rope_scale: Tensor | None = None,
        taught: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Normalised images [B, 3, h, w] -> {"loss": float32 [], "told": [B, 4 M, D], "targets": float32 [B, 4 M, D]}.

        sample_keys: int64 [B], whence blocks and drop path are drawn; None (evaluation, and the teacher): the result is
            {"predictions": [B, T, D]}, the backbone's output for whole images
        rope_scale: float32 [], factor on the coordinates of rotary position; None: 1
        taught: [B, T, D], what the teacher made of the same images; needed where keys are given
        """
        if sample_keys is None:
            return {"predictions": self.backbone(images, causal=False, rope_scale=rope_scale)[1]}
        assert taught is not None, "there is nothing to predict without a teacher's outputs"
        context, blocks = draw_blocks(sample_keys, self.layout)
        _, seen = self.backbone(images, causal=False, rope_scale=rope_scale, visible=context, sample_keys=sample_keys)
        told = self.predictor(seen, context, blocks, self.layout.grid, rope_scale).flatten(1, 2)
        targets = select(F.layer_norm(taught[:, 1:].float(), taught.shape[-1:]), blocks.flatten(1)).detach()
        return {"loss": F.smooth_l1_loss(told.float(), targets), "told": told, "targets": targets}
