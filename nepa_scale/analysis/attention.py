"""Attention, one row at a time: the fused kernel of the model never forms the matrix, and neither does this.

Shapes: B images, L layers, H heads, Q queries, T = 1 + patches tokens (CLS first), d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nepa_scale.analysis.queries import Grid
from nepa_scale.models import CausalViT
from nepa_scale.models.layers import Attention

CLS = 1  # tokens before the first patch


@torch.no_grad()
def attention_rows(backbone: CausalViT, images: Tensor, tokens: Tensor, *, causal: bool) -> list[Tensor]:
    """What these tokens attend to: for each layer float32 [B, H, Q, T], every row summing to 1.

    images: normalised [B, 3, h, w]
    tokens: int64 [Q], the queries
    causal: lower-triangular attention, as in the forward pass of the model
    """
    rows: list[Tensor] = []

    def keep(attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, rope, masked = inputs
        rows.append(rows_of_layer(attention, x, rope, tokens, masked))

    layers = [module for module in backbone.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        backbone(images, causal=causal)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def rows_of_layer(
    attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor] | None, tokens: Tensor, causal: bool
) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the queries `tokens` (int64 [Q]) only, float32 [B, H, Q, T].

    x, rope, causal: the layer's inputs, x [B, T, D]
    """
    queries, keys, _ = attention.queries_keys_values(x, rope)
    scores = queries[:, :, tokens].float() @ keys.float().transpose(-1, -2) / math.sqrt(attention.head_dim)
    if causal:
        later = torch.arange(x.shape[1], device=x.device) > tokens[:, None]
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)


def uniform_rows(tokens: Tensor, count: int, causal: bool) -> Tensor:
    """The rows [Q, T] of attention that weighs all visible tokens alike: what to compare with. `count`: T."""
    if not causal:
        return torch.full((len(tokens), count), 1.0 / count, device=tokens.device)
    visible = torch.arange(count, device=tokens.device) <= tokens[:, None]
    return visible / visible.sum(1, keepdim=True)


def row_measures(rows: Tensor, tokens: Tensor, grid: Grid) -> dict[str, Tensor]:
    """How far and how widely each row [..., Q, T] looks, float32 [..., Q] each; `tokens` are the queries' patches.

    distance_patches: sum_j a_j |p_j - p_q| / sum_j a_j over the patches j, p being (row, column): CLS has no place
    distance_diagonal: the same as a share of the image's diagonal, sqrt(rows^2 + columns^2) patches
    entropy_nats: -sum_j a_j ln a_j over all tokens
    cls_share: the weight on CLS
    """
    patches = rows[..., CLS:]
    weighed = (patches * _distances(tokens - CLS, grid)).sum(-1)
    distance = weighed / patches.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "distance_patches": distance,
        "distance_diagonal": distance / math.hypot(*grid),
        "entropy_nats": torch.special.entr(rows).sum(-1),
        "cls_share": rows[..., 0],
    }


def _distances(patches: Tensor, grid: Grid) -> Tensor:
    """From each of `patches` (numbers, int64 [Q]) to all patches of the grid, in patches: float32 [Q, T - 1]."""
    everywhere = torch.arange(grid[0] * grid[1], device=patches.device)

    def coordinates(numbers: Tensor) -> Tensor:
        return torch.stack([numbers // grid[1], numbers % grid[1]], dim=-1).float()

    difference = coordinates(patches)[:, None] - coordinates(everywhere)
    return difference.square().sum(-1).sqrt()


class AttentionSurvey:
    """Means of `row_measures` by layer and head over queries of many images, beside those of uniform attention."""

    def __init__(self) -> None:
        self.queries = 0
        self._sums: dict[str, Tensor] = {}  # float64 [L, H]
        self._uniform: dict[str, float] = {}

    def add(self, rows: list[Tensor], tokens: Tensor, grid: Grid, causal: bool) -> None:
        """Adds the rows of one image, [1, H, Q, T] for each layer; `tokens`, int64 [Q], are patches."""
        found = row_measures(torch.cat(rows), tokens, grid)
        uniform = row_measures(uniform_rows(tokens, rows[0].shape[-1], causal), tokens, grid)
        self.queries += len(tokens)
        for key, values in found.items():
            total = values.double().sum(-1).cpu()
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            self._uniform[key] = self._uniform.get(key, 0.0) + float(uniform[key].double().sum())

    def facts(self) -> dict[str, Any]:
        """`queries`; `uniform`: the means for uniform attention; `layers`: for each layer (from 1) and measure a number
        a head, and `distance_ratio` and `entropy_ratio`, which are shares of the uniform means."""
        uniform = {key: total / self.queries for key, total in self._uniform.items()}
        means = {key: total / self.queries for key, total in self._sums.items()}
        for ratio, key in (("distance_ratio", "distance_patches"), ("entropy_ratio", "entropy_nats")):
            means[ratio] = means[key] / uniform[key]
        depth = len(means["cls_share"])
        layers = [{"layer": n + 1, **{key: values[n].tolist() for key, values in means.items()}} for n in range(depth)]
        return {"queries": self.queries, "uniform": uniform, "layers": layers}
