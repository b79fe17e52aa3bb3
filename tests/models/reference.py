"""The causal ViT a second time, from its description: one image patch, one head and one token at a time, in float64.

It shares no code and no formulation with `nepa_scale.models`: convolution patch by patch, separate queries, keys and
values, rotation by complex numbers, an explicit mask and softmax, norms and activations from their formulas. Slow, and
meant to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = 1e-12


@dataclass(frozen=True)
class Settings:
    """What the weights alone do not say."""

    patch_size: int
    heads: int
    depth: int
    gated: bool = False
    causal: bool = True
    rope: bool = True
    rope_theta: float = 100.0
    rope_scale: float = 1.0
    qk_norm: str = "none"  # none | plain | affine
    layer_scale: bool = True


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fills every parameter with values under which no part of the network is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm.weight", "_scale")):
                parameter.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 1 or "token" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters as float64 leaves that take gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def forward(w: dict[str, Tensor], images: Tensor, s: Settings, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(embeddings, predictions), float64 [B, T, D], of images [B, 3, h, w]; mask: bool [B, T-1], True: hidden."""
    embeddings = embed(w, images, s)
    x = embeddings
    if mask is not None:
        hidden = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).double().unsqueeze(-1)
        x = x * (1.0 - hidden) + w["mask_token.weight"] * hidden
    angles = patch_angles(images.shape[2] // s.patch_size, images.shape[3] // s.patch_size, x.shape[-1] // s.heads, s)
    for n in range(s.depth):
        x = block(w, f"blocks.{n}.", x, angles, s)
    return embeddings, layer_norm(x, w["norm.weight"], w["norm.bias"])


def embed(w: dict[str, Tensor], images: Tensor, s: Settings) -> Tensor:
    p = s.patch_size
    images = images.double()
    tokens = [w["embedding.cls_token"][0].expand(images.shape[0], -1)]
    for top in range(0, images.shape[2], p):
        for left in range(0, images.shape[3], p):
            patch = images[:, :, top : top + p, left : left + p]
            tokens.append(torch.einsum("bcij,dcij->bd", patch, w["embedding.weight"]) + w["embedding.bias"])
    return torch.stack(tokens, dim=1)


def patch_angles(rows: int, columns: int, head_dim: int, s: Settings) -> Tensor:
    """[patches, d/2]: for each patch its d/4 angles by height, then its d/4 by width."""
    frequencies = [s.rope_theta ** -(4.0 * k / head_dim) for k in range(head_dim // 4)]
    table = []
    for row in range(rows):
        for column in range(columns):
            y = (2.0 * (row + 0.5) / rows - 1.0) * s.rope_scale
            x = (2.0 * (column + 0.5) / columns - 1.0) * s.rope_scale
            table.append([2.0 * math.pi * y * f for f in frequencies] + [2.0 * math.pi * x * f for f in frequencies])
    return torch.tensor(table, dtype=torch.float64)


def rotate(v: Tensor, angles: Tensor) -> Tensor:
    """v [B, T, d]: all tokens but the first turned, the pair (i, i + d/2) as one complex number."""
    half = v.shape[-1] // 2
    turned = torch.complex(v[:, 1:, :half], v[:, 1:, half:]) * torch.exp(1j * angles)
    return torch.cat([v[:, :1], torch.cat([turned.real, turned.imag], dim=-1)], dim=1)


def block(w: dict[str, Tensor], name: str, x: Tensor, angles: Tensor, s: Settings) -> Tensor:
    normed = layer_norm(x, w[f"{name}attention_norm.weight"], w[f"{name}attention_norm.bias"])
    update = attention(w, f"{name}attention.", normed, angles, s)
    x = x + (update * w[f"{name}attention_scale"] if s.layer_scale else update)
    normed = layer_norm(x, w[f"{name}mlp_norm.weight"], w[f"{name}mlp_norm.bias"])
    update = mlp(w, f"{name}mlp.", normed, s)
    return x + (update * w[f"{name}mlp_scale"] if s.layer_scale else update)


def attention(w: dict[str, Tensor], name: str, x: Tensor, angles: Tensor, s: Settings) -> Tensor:
    width = x.shape[-1]
    head_dim, tokens = width // s.heads, x.shape[1]
    weights, biases = w[f"{name}qkv.weight"].split(width), w[f"{name}qkv.bias"].split(width)
    queries, keys, values = (x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
    heads = []
    for h in range(s.heads):
        q, k, v = (part[..., h * head_dim : (h + 1) * head_dim] for part in (queries, keys, values))
        if s.qk_norm != "none":
            affine = s.qk_norm == "affine"
            q = layer_norm(q, w[f"{name}query_norm.weight"] if affine else None)
            k = layer_norm(k, w[f"{name}key_norm.weight"] if affine else None)
        if s.rope:
            q, k = rotate(q, angles), rotate(k, angles)
        scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(head_dim)
        if s.causal:
            for position in range(tokens):
                scores[:, position, position + 1 :] = -math.inf
        shares = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        heads.append((shares / shares.sum(dim=-1, keepdim=True)) @ v)
    return torch.cat(heads, dim=-1) @ w[f"{name}out.weight"].T + w[f"{name}out.bias"]


def mlp(w: dict[str, Tensor], name: str, x: Tensor, s: Settings) -> Tensor:
    hidden = x @ w[f"{name}up.weight"].T + w[f"{name}up.bias"]
    if s.gated:
        gate = x @ w[f"{name}gate.weight"].T + w[f"{name}gate.bias"]
        hidden = gate / (1.0 + torch.exp(-gate)) * hidden
    else:
        hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return hidden @ w[f"{name}down.weight"].T + w[f"{name}down.bias"]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def loss(embeddings: Tensor, predictions: Tensor) -> Tensor:
    """Minus the mean cosine of each prediction and the next embedding, which takes no gradient."""
    total = torch.zeros((), dtype=torch.float64)
    steps = embeddings.shape[1] - 1
    for t in range(steps):
        target, predicted = embeddings[:, t + 1].detach(), predictions[:, t]
        lengths = torch.sqrt((target * target).sum(-1)) * torch.sqrt((predicted * predicted).sum(-1))
        total = total - ((target * predicted).sum(-1) / lengths).mean()
    return total / steps
