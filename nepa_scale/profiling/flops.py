"""FLOPs of the causal ViT in closed form.

Convention: a multiply-add is 2 FLOPs; matrix products, the patch embedding and attention count, attention in full
(causal masking is not credited); element-wise work, norms and softmax do not. This is the model's own work: a backward
pass without recomputation.
"""

from __future__ import annotations

from nepa_scale.models import Architecture


def forward_flops(architecture: Architecture) -> dict[str, int]:
    """Forward FLOPs of one image by module: `embedding`, and summed over the blocks `qkv`, `scores`, `out`, `mlp`."""
    a = architecture
    patches, tokens, width = a.tokens - 1, a.tokens, a.width
    mlp_products = 3 if a.gated else 2
    return {
        "embedding": 2 * patches * 3 * a.patch_size**2 * width,
        "qkv": a.depth * 2 * tokens * width * 3 * width,
        "scores": a.depth * 2 * 2 * tokens * tokens * width,
        "out": a.depth * 2 * tokens * width * width,
        "mlp": a.depth * 2 * tokens * width * a.mlp_width * mlp_products,
    }


def train_flops(architecture: Architecture) -> int:
    """Forward and backward FLOPs of one image: every product has two in the backward pass, except that the patch
    embedding has only one (images need no gradient)."""
    parts = forward_flops(architecture)
    return 3 * sum(parts.values()) - parts["embedding"]
