"""Masked autoencoding (He et al. 2021, arXiv 2111.06377, section 3): the pixels of hidden patches from visible ones.

Shapes: B images, N patches, K of them visible and M hidden, P patch size, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from nepa_scale.config import ConfigError, ObjectiveConfig
from nepa_scale.counter_random import uniform
from nepa_scale.models import Architecture, CausalViT
from nepa_scale.models.layers import pixels_of_patches
from nepa_scale.models.selection import select
from nepa_scale.objectives.decoder import Decoder, decoder_architecture

SHARE, MOST = 2 / 3, (512, 8)  # of the encoder's width and depth: the paper's decoder beside ViT-B and larger
HEAD = 32  # width of a decoder's head: the official one has 16 in its width of 512
VARIANCE_EPS = 1e-6  # the official code's


def mae_decoder(encoder: Architecture, objective: ObjectiveConfig) -> Architecture:
    """The decoder's shape. Raises ConfigError as `decoder_architecture` does."""
    return decoder_architecture(
        encoder, "mae", objective.mae.width, objective.mae.depth, SHARE, MOST, unit=HEAD, head=HEAD
    )


def hidden_patches(encoder: Architecture, objective: ObjectiveConfig) -> int:
    """M of the encoder's images. The official code rounds the number of those that stay visible down.

    Raises:
        ConfigError: it would be none or all of the patches.
    """
    patches = encoder.tokens - 1
    hidden = patches - int(patches * (1 - objective.mae.hidden))
    if not 0 < hidden < patches:
        raise ConfigError(
            f"objective.mae.hidden={objective.mae.hidden} hides {hidden} of {patches} patches: some must be hidden and "
            "some visible"
        )
    return hidden


def hide(sample_keys: Tensor, patches: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Which patches are visible, int64 [B, N - M], and which hidden, [B, M]: a pure function of the keys, int64 [B]."""
    scores = uniform(sample_keys, "mae", count=patches)
    order = scores.argsort(dim=1, stable=True)  # stable: equal scores have one order on every device
    return order[:, hidden:], order[:, :hidden]


def normalized_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, 3, h, w] -> float32 [B, N, 3 P P], each patch with mean 0 and (unbiased) variance 1."""
    pixels = pixels_of_patches(images.float(), patch_size)
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + VARIANCE_EPS).sqrt()


class MaskedAutoencoder(nn.Module):
    """A backbone, which sees the visible patches only, and a decoder: the module that the strategies shard and step.

    Raises:
        ConfigError: see `mae_decoder`, `hidden_patches`.
    """

    def __init__(self, backbone: CausalViT, objective: ObjectiveConfig) -> None:
        super().__init__()
        a = backbone.architecture
        self.hidden = hidden_patches(a, objective)
        self.backbone = backbone
        self.decoder = Decoder(a, mae_decoder(a, objective), 3 * a.patch_size**2, backbone.dtype)

    @property
    def units(self) -> list[nn.Module]:
        """The submodules that are gathered, recomputed and compiled as one, in the order of the forward pass."""
        return [self.backbone.embedding, *self.backbone.blocks, *self.decoder.blocks]

    def forward(
        self, images: Tensor, *, sample_keys: Tensor | None = None, rope_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised images [B, 3, h, w] -> {"loss": float32 [], "pixels": [B, M, 3 P P]}.

        The loss is the mean squared error of the hidden patches' normalised pixels; to tell each patch's mean only,
        that is 0, has a loss of (n - 1) / n for patches of n = 3 P P values.

        sample_keys: int64 [B], whence masks and drop path are drawn; None (evaluation): nothing is hidden or decoded,
            and the result is {"predictions": [B, T, D]}, the backbone's output
        rope_scale: float32 [], factor on the coordinates of rotary position; None: 1
        """
        if sample_keys is None:
            return {"predictions": self.backbone(images, causal=False, rope_scale=rope_scale)[1]}
        p = self.backbone.architecture.patch_size
        grid = (images.shape[2] // p, images.shape[3] // p)
        visible, hidden = hide(sample_keys, grid[0] * grid[1], self.hidden)
        _, seen = self.backbone(images, causal=False, rope_scale=rope_scale, visible=visible, sample_keys=sample_keys)
        pixels = self.decoder(seen, visible, hidden.unsqueeze(1), grid, rope_scale).squeeze(1)
        targets = select(normalized_pixels(images, p), hidden)
        return {"loss": (pixels.float() - targets).square().mean(), "pixels": pixels}
