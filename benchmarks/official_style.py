"""The peer of the step benchmarks: the same model and step as one would write them in plain PyTorch.

That is how the method's released code runs: fp32 parameters under bf16 autocast, separate projections for queries, keys
and values, a convolution for the patches, no compilation, torch's AdamW and gradient clipping, an average of the
weights. It computes the same loss from the same weights (tests/benchmarks); nothing of it is shared with nepa_scale.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, gated: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.norm_before, self.norm_after = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.gate = nn.Linear(width, mlp_width) if gated else None
        self.up, self.down = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.scale_attention, self.scale_mlp = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm_before(x)
        q, k, v = (self._split(layer(y)) for layer in (self.query, self.key, self.value))
        if self.qk_norm:
            q, k = (F.layer_norm(z, z.shape[-1:], eps=EPS) for z in (q, k))
        q, k = (rotated(z, cos, sin).to(v.dtype) for z in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.scale_attention * self.dense(mixed)
        y = self.norm_after(x)
        y = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.scale_mlp * self.down(y)

    def _split(self, z: Tensor) -> Tensor:
        return z.view(*z.shape[:2], self.heads, -1).transpose(1, 2)


def rotated(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = z.float().chunk(2, dim=-1)
    return z.float() * cos + torch.cat([-second, first], dim=-1) * sin


class PlainViT(nn.Module):
    """Images [B, 3, S, S] -> loss, float32 []; the rotary factor is 1."""

    def __init__(
        self, width: int, depth: int, heads: int, mlp_width: int, patch_size: int, *, gated: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.head_dim, self.patch_size = width // heads, patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, gated, qk_norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        embeddings = torch.cat([self.cls_token.to(patches.dtype).expand(len(images), -1, -1), patches], dim=1)
        cos, sin = self._rope(images)
        x = embeddings
        for block in self.blocks:
            x = block(x, cos, sin)
        predictions = self.norm(x)
        return -F.cosine_similarity(predictions[:, :-1].float(), embeddings[:, 1:].detach().float(), dim=-1).mean()

    def _rope(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = (
            2 * (torch.arange(side // self.patch_size, device=images.device) + 0.5) / (side // self.patch_size) - 1
            for side in images.shape[2:]
        )
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        exponents = torch.arange(self.head_dim // 4, device=images.device) * 4 / self.head_dim
        angles = (2 * math.pi * grid.unsqueeze(-1) * 100.0**-exponents).flatten(1).repeat(1, 2)
        angles = F.pad(angles, (0, 0, 1, 0))  # CLS is not rotated
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def load(self, ours: dict[str, Tensor]) -> None:
        """Takes over the weights of `nepa_scale.models.CausalViT`."""
        pairs = {"cls_token": "embedding.cls_token", "patches.weight": "embedding.weight"}
        pairs |= {"patches.bias": "embedding.bias", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
        for number in range(len(self.blocks)):
            for kind in ("weight", "bias"):
                parts = ours[f"blocks.{number}.attention.qkv.{kind}"].chunk(3)
                for name, part in zip(("query", "key", "value"), parts, strict=True):
                    self.get_parameter(f"blocks.{number}.{name}.{kind}").copy_(part)
                for mine, its in _BLOCK_NAMES.items():
                    if f"blocks.{number}.{its}.{kind}" in ours:
                        pairs[f"blocks.{number}.{mine}.{kind}"] = f"blocks.{number}.{its}.{kind}"
            pairs[f"blocks.{number}.scale_attention"] = f"blocks.{number}.attention_scale"
            pairs[f"blocks.{number}.scale_mlp"] = f"blocks.{number}.mlp_scale"
        for mine, its in pairs.items():
            self.get_parameter(mine).copy_(ours[its])


_BLOCK_NAMES = {
    "norm_before": "attention_norm", "norm_after": "mlp_norm", "dense": "attention.out", "gate": "mlp.gate",
    "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip


class PlainStep:
    """A step on uint8 images [B, 3, S, S]: normalise, forward, backward, clip, AdamW, average of the weights."""

    def __init__(self, model: PlainViT, precision: str, ema: float) -> None:
        self.model, self.precision, self.ema = model, precision, ema
        device = next(model.parameters()).device
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)
        self.averages = [p.detach().clone() for p in model.parameters()]
        self.autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    def __call__(self, images: Tensor) -> Tensor:
        """The loss [] on the device."""
        with self.autocast:
            loss: Tensor = self.model(images.float() / 127.5 - 1)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.model.parameters()], 1 - self.ema)
        return loss.detach()
