"""Two-dimensional rotary position, as in DINOv3 (arXiv 2508.10104, section 3.2) and NEPA.

Shapes: T tokens (CLS first), d head width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _patch_angles(grid: tuple[int, int], head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles of the patches in radians, float32 [h * w, d/2]: row frequencies, then column frequencies.

    Patch centres (i + 0.5) / n are mapped to [-1, 1] on each axis; the d/4 frequencies are theta^(-4k/d).
    """
    with torch.inference_mode(False):  # the table outlives the call, and training must be able to use it
        rows, columns = (2.0 * (torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n - 1.0 for n in grid)
        exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * (4.0 / head_dim)
        frequencies = 2.0 * math.pi * theta**-exponents
        coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2, 1)
        return (coordinates * frequencies).flatten(1)


def rope_tables(
    grid: tuple[int, int], head_dim: int, theta: float, device: torch.device, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [T, d] each; the CLS row is the identity (1 and 0).

    grid: patches per column and per row
    scale: float32 [], factor on all coordinates (NEPA's augmentation in training); None: 1
    """
    # under torch.export the table is a stand-in without values, which must not be kept
    angles_of = _patch_angles.__wrapped__ if torch.compiler.is_exporting() else _patch_angles
    angles = angles_of(grid, head_dim, theta, device)
    if scale is not None:
        angles = angles * scale
    angles = torch.cat([angles.new_zeros(1, angles.shape[1]), angles]).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, T, H, d] with its pairs (i, i + d/2) turned by the angles of tables [T, d] or [B, T, d], as float32."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
