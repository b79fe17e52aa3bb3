"""A narrow ViT that tells hidden patches from visible ones: MAE's decoder and JEPA's predictor.

It serves pretraining only. It differs from the backbone's in that attention is bidirectional, norms of queries and
keys, LayerScale and drop path are off and the MLP is GELU of four times the width, whatever the backbone has, as in
both papers; position is rotary as there.

Shapes: B images, K visible patches, n sets of M hidden ones, D width of the encoder.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from nepa_scale.config import ConfigError
from nepa_scale.models import Architecture
from nepa_scale.models.layers import Block, LayerNorm, Linear
from nepa_scale.models.rope import rope_tables
from nepa_scale.models.selection import select_tables, with_cls


def decoder_architecture(
    encoder: Architecture,
    name: str,
    width: int | None,
    depth: int | None,
    share: float,
    most: tuple[int, int],
    *,
    unit: int,
    head: int | None = None,
) -> Architecture:
    """The shape of a decoder beside `encoder`, for images of the same patches.

    name: the objective's, for errors
    width, depth: null: `share` of the encoder's, no more than `most`; the width in multiples of `unit`
    unit: what the width must be a multiple of
    head: width of a head; None: as many heads as the encoder has
    Raises:
        ConfigError: a width that is not a multiple of `unit`, or a backbone on which the objective cannot work.
    """
    if not encoder.rope:
        raise ConfigError(f"objective.name={name} needs model.rope=true: nothing else tells where a hidden patch is")
    if encoder.base_width is not None or encoder.base_depth is not None:
        raise ConfigError(
            f"objective.name={name} has parts whose learning rates do not transfer between sizes: "
            "leave out model.base_width and model.base_depth"
        )
    if width is None:
        width = -(-min(most[0], round(share * encoder.width)) // unit) * unit
    heads = encoder.heads if head is None else width // head
    if width % unit:
        raise ConfigError(
            f"objective.{name}.width={width} is not a multiple of {unit}, as its heads need: take "
            f"{-(-width // unit) * unit}"
        )
    return dataclasses.replace(
        encoder,
        width=width,
        depth=depth or min(most[1], max(1, round(share * encoder.depth))),
        heads=heads,
        mlp_width=4 * width,
        gated=False,
        qk_norm="none",
        layer_scale=None,
        drop_path=0.0,
        mask_token=False,
    )


class Decoder(nn.Module):
    """From the encoder's output of visible patches to `outputs` numbers for each hidden one.

    dtype: of the matrix products
    """

    def __init__(self, encoder: Architecture, own: Architecture, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.own, self.dtype = own, dtype
        self.embed = Linear(encoder.width, own.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, own.width))
        self.blocks = nn.ModuleList(
            Block(own.width, own.heads, own.mlp_width, gated=False, qk_norm="none", layer_scale=False)
            for _ in range(own.depth)
        )
        self.norm = LayerNorm(own.width)
        self.head = Linear(own.width, outputs)

    def forward(
        self, seen: Tensor, visible: Tensor, hidden: Tensor, grid: tuple[int, int], rope_scale: Tensor | None
    ) -> Tensor:
        """[B, n, M, outputs] in `dtype`, in the order of `hidden`.

        seen: [B, 1 + K, D], the encoder's output, CLS first
        visible: int64 [B, K], which patches these are, counted row by row
        hidden: int64 [B, n, M], the patches to tell: n sets of an image, each told by itself
        grid: patches per column and per row
        rope_scale: float32 [], that of the encoder's coordinates; None: 1
        """
        own, (batch, sets, count) = self.own, hidden.shape
        tables = rope_tables(grid, own.head_dim, own.rope_theta, seen.device, rope_scale)
        patches = torch.cat([visible.repeat_interleave(sets, 0), hidden.flatten(0, 1)], dim=1)
        rope = select_tables(tables, with_cls(patches))
        x = self.embed(seen).repeat_interleave(sets, 0)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(batch * sets, count, -1)], dim=1).float()
        for block in self.blocks:
            x = block(x, rope, False, self.dtype, None)
        return self.head(self.norm(x[:, -count:], self.dtype)).unflatten(0, (batch, sets))
