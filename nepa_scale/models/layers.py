"""The parts of a block.

Precision is written out rather than left to autocast, so that it is the same under every sharding strategy: parameters
arrive in fp32 (one process, DDP) or already in the compute dtype (FSDP2, ZeRO) and are cast to the dtype of the
activation at their use; the residual stream and the norms are fp32. The residual stream has to be: LayerScale starts
at 1e-5, and bf16 would round such an update of a value near 1 away.

Parameters are left uninitialised here; `nepa_scale.models.initialization` fills them by name.

Shapes: B images, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.counter_random import uniform_each
from nepa_scale.models.rope import rotate

NORM_EPS = 1e-12


class Linear(nn.Linear):
    """A Linear with bias that computes in the dtype of its input."""

    def reset_parameters(self) -> None:
        """Nothing: drawing weights that are overwritten costs minutes at billions of parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, computed in fp32 from an input of any dtype; eps 1e-12, bias optional.

    The result is returned in `dtype` of the call, the input's own where none is given. Weight and bias are first
    rounded to the dtype of the products, which is the input's or, behind the fp32 residual stream, the result's.
    """

    def __init__(self, width: int, *, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width)) if weight else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        products = dtype if x.dtype == torch.float32 else x.dtype
        weight, bias = (None if p is None else p.to(products).float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), (self.width,), weight, bias, NORM_EPS).to(dtype)


class PatchEmbedding(nn.Module):
    """Images [B, 3, h, w] -> embeddings [B, T, D]: non-overlapping patches, row by row, after a learned CLS token.

    A convolution whose stride is its kernel is a matrix product, and on an accelerator it is computed as one: cuDNN's
    convolutions use TF32 by default and do not repeat themselves bit for bit. On the host the convolution is kept: it
    rounds as the original code does, and AdamW's first steps make any other rounding visible in the fifth decimal.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.frozen = False  # whether weight and bias (not the CLS token) receive no gradient

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {self.patch_size}")
        embed = convolve_patches if images.device.type == "cpu" else multiply_patches
        weight, bias = (_held(self.weight), _held(self.bias)) if self.frozen else (self.weight, self.bias)
        patches = embed(images.to(dtype), weight.to(dtype), bias.to(dtype))
        return torch.cat([self.cls_token.to(dtype).expand(images.shape[0], -1, -1), patches], dim=1)


def _held(parameter: Tensor) -> Tensor:
    """The same values with a gradient of zeros: a parameter without one would need its own place in every sharding."""
    return parameter.detach() + 0 * parameter


def convolve_patches(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Images [B, 3, h, w], weight [D, 3, P, P], bias [D] -> [B, patches, D], as a convolution."""
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def multiply_patches(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as a matrix product."""
    return F.linear(pixels_of_patches(images, weight.shape[-1]), weight.flatten(1), bias)


def pixels_of_patches(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, h, w] -> [B, patches, C P P], patches row by row, each in the order of a convolution's weight."""
    p = patch_size
    patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention [B, T, D] -> [B, T, D] with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, qk_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.normalized = qk_norm != "none"
        if self.normalized:
            affine = qk_norm == "affine"
            self.query_norm = LayerNorm(self.head_dim, weight=affine, bias=False)
            self.key_norm = LayerNorm(self.head_dim, weight=affine, bias=False)

    def queries_keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Three [B, H, T, d], queries and keys normalised and rotated.

        That happens in fp32 up to the one rounding at the end, and in the layout of the projection: heads are brought
        before tokens as views only, which spares copies in both passes.
        """
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_dim).unbind(2)
        if self.normalized:
            q, k = self.query_norm(q, torch.float32), self.key_norm(k, torch.float32)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.to(x.dtype).transpose(1, 2), k.to(x.dtype).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, causal: bool) -> Tensor:
        q, k, v = self.queries_keys_values(x, rope)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """[B, T, D] -> [B, T, D]: GELU (exact erf), or SwiGLU, whose width is not reduced by the customary 2/3."""

    def __init__(self, width: int, mlp_width: int, gated: bool) -> None:
        super().__init__()
        self.gate = Linear(width, mlp_width) if gated else None
        self.up = Linear(width, mlp_width)
        self.down = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm block on the fp32 residual stream [B, T, D]."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, gated: bool, qk_norm: str, layer_scale: bool) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, gated)
        self.attention_scale = nn.Parameter(torch.empty(width)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.empty(width)) if layer_scale else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        causal: bool,
        dtype: torch.dtype,
        kept: Tensor | None,
    ) -> Tensor:
        """x: fp32 [B, T, D]; dtype: of the matrix products; kept: the block's factors of `drop_path_factors`.

        What differs from block to block is a tensor, not a number, so that compiled blocks share one graph.
        """
        kept_attention, kept_mlp = (None, None) if kept is None else kept.unbind(0)
        mixed = self.attention(self.attention_norm(x, dtype), rope, causal)
        x = x + _branch(mixed, self.attention_scale, kept_attention)
        hidden = self.mlp(self.mlp_norm(x, dtype))
        return x + _branch(hidden, self.mlp_scale, kept_mlp)


def _branch(y: Tensor, scale: Tensor | None, kept: Tensor | None) -> Tensor:
    """A branch [B, T, D] as it is added to the stream: in fp32, scaled by channel [D] and by sample [B, 1, 1].

    The product takes the branch in its own dtype, and so keeps no fp32 copy of it for the backward pass.
    """
    y = y.float() if scale is None else y * scale.to(y.dtype).float()
    return y if kept is None else y * kept


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Of the blocks: linear from 0 in the first to `rate` in the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def drop_path_factors(sample_keys: Tensor, rates: Sequence[float]) -> list[Tensor | None]:
    """For each block what its branches, attention and MLP, are multiplied with: float32 [2, B, 1, 1].

    A dropped branch by 0, a kept one by 1 / (1 - rate), drawn for each sample from its key. None where the rate is 0.
    """
    dropping = [index for index, rate in enumerate(rates) if rate > 0]
    factors: list[Tensor | None] = [None] * len(rates)
    if dropping:
        branches = tuple(("drop_path", name, index) for index in dropping for name in ("attention", "mlp"))
        drawn = uniform_each(sample_keys, branches).view(len(dropping), 2, -1, 1, 1)
        for index, numbers in zip(dropping, drawn.unbind(0), strict=True):
            factors[index] = (numbers >= rates[index]).float() / (1.0 - rates[index])
    return factors
