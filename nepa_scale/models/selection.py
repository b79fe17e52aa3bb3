"""Some tokens of a sequence, each image its own.

Shapes: B images, T = 1 + patches tokens (CLS first), K patches of each image, D width, d head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def with_cls(patches: Tensor) -> Tensor:
    """Numbers of patches, int64 [B, K], row by row -> numbers of tokens, [B, 1 + K]: CLS, then these patches."""
    return F.pad(patches + 1, (1, 0))


def select(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, T, D] and int64 [B, K] -> its rows of these tokens, [B, K, D]."""
    return x.gather(1, tokens.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def select_tables(tables: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables [T, d] and int64 [B, K] -> those of these tokens, [B, K, d]."""
    cos, sin = tables
    return cos[tokens], sin[tokens]
