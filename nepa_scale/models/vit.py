"""The causal Vision Transformer of NEPA (arXiv 2512.16922).

Shapes: B images, T = 1 + patches tokens (CLS first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import ModelConfig
from nepa_scale.models.initialization import initialize_module
from nepa_scale.models.layers import Block, LayerNorm, PatchEmbedding, drop_path_factors, drop_path_rates
from nepa_scale.models.rope import rope_tables
from nepa_scale.models.selection import select, select_tables, with_cls
from nepa_scale.models.sizes import Architecture, resolve_architecture


class MaskToken(nn.Module):
    """Replaces the embeddings [B, T, D] of masked patches (bool [B, T-1], True: masked) by one learned vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        masked = torch.cat([mask.new_zeros(mask.shape[0], 1), mask], dim=1).unsqueeze(-1)
        return torch.where(masked, self.weight.to(embeddings.dtype), embeddings)


class CausalViT(nn.Module):
    """Patch embedding, blocks, final norm: no head, no absolute position.

    `dtype` is that of the matrix products, whatever the parameters' own (see `layers`).
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.architecture = architecture
        self.dtype = dtype
        a = architecture
        self.embedding = PatchEmbedding(a.patch_size, a.width)
        self.mask_token = MaskToken(a.width) if a.mask_token else None
        self.blocks = nn.ModuleList(
            Block(
                a.width,
                a.heads,
                a.mlp_width,
                gated=a.gated,
                qk_norm=a.qk_norm,
                layer_scale=a.layer_scale is not None,
            )
            for _ in range(a.depth)
        )
        self.norm = LayerNorm(a.width)

    def forward(
        self,
        images: Tensor,
        *,
        causal: bool = True,
        rope_scale: Tensor | None = None,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
        sample_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, h, w] -> (embeddings, predictions), both [B, T, D] in `dtype`.

        embeddings: the patch embedding's output, before masking: what NEPA predicts
        predictions: the last block's output after the final norm
        causal: lower-triangular attention over CLS and the patches in raster order; else bidirectional
        rope_scale: float32 [], factor on the coordinates of rotary position; None: 1
        mask: bool [B, T-1], True where a patch's input is replaced by the mask token
        visible: int64 [B, K], the patches that enter the blocks, counted row by row, each at its own place in the
            image; predictions are then [B, 1 + K, D], CLS first. None: all
        sample_keys: int64 [B], randomness of drop path; only used in training
        """
        embeddings = self.embedding(images, self.dtype)
        inputs = embeddings
        if mask is not None and self.mask_token is not None:
            inputs = self.mask_token(embeddings, mask)
        rope = self.rotary(images, rope_scale)
        if visible is not None:
            tokens = with_cls(visible)
            inputs, rope = select(inputs, tokens), rope and select_tables(rope, tokens)
        kept: list[Tensor | None] = [None] * len(self.blocks)
        if self.training and sample_keys is not None:
            kept = drop_path_factors(sample_keys, drop_path_rates(self.architecture.drop_path, len(self.blocks)))
        x = inputs.float()
        for block, factors in zip(self.blocks, kept, strict=True):
            x = block(x, rope, causal, self.dtype, factors)
        return embeddings, self.norm(x, self.dtype)

    def hidden_states(self, images: Tensor, blocks: Sequence[int], *, causal: bool = True) -> list[Tensor]:
        """Images [B, 3, h, w] -> the outputs of these blocks (counted from 0), each float32 [B, T, D].

        That of the last block is taken after the final norm; the others are normalised without weights, so that depths
        can be compared.
        """
        rope = self.rotary(images)
        x = self.embedding(images, self.dtype).float()
        found = {}
        for number, block in enumerate(self.blocks):
            x = block(x, rope, causal, self.dtype, None)
            if number in blocks:
                last = number == len(self.blocks) - 1
                found[number] = self.norm(x, self.dtype).float() if last else F.layer_norm(x, x.shape[-1:])
        return [found[number] for number in blocks]

    def dense_features(self, images: Tensor, blocks: Sequence[int], *, causal: bool = True) -> list[Tensor]:
        """`hidden_states` of the patches as maps, each float32 [B, D, h / P, w / P]."""
        grid = (images.shape[2] // self.architecture.patch_size, images.shape[3] // self.architecture.patch_size)
        states = self.hidden_states(images, blocks, causal=causal)
        return [state[:, 1:].transpose(1, 2).unflatten(2, grid) for state in states]

    def rotary(self, images: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The tables of rotary position for images of this size (see `rope_tables`); None where the model has none."""
        a = self.architecture
        if not a.rope:
            return None
        grid = (images.shape[2] // a.patch_size, images.shape[3] // a.patch_size)
        return rope_tables(grid, a.head_dim, a.rope_theta, images.device, scale)


def build_vit(
    size: str = "vit_b", patch_size: int = 14, image_size: int | tuple[int, int] = 224, *, seed: int = 0, **model: Any
) -> CausalViT:
    """An initialised fp32 backbone of a named size; further keywords are the fields of `ModelConfig`.

    Raises:
        ConfigError: unknown size or impossible numbers.
    """
    sides = image_size if isinstance(image_size, int) else list(image_size)
    config = ModelConfig(size=size, patch_size=patch_size, image_size=sides, **model)
    vit = CausalViT(resolve_architecture(config))
    initialize_module(vit, vit.architecture, seed)
    return vit
