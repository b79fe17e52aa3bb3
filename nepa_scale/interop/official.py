"""Weights in the official NEPA layout, both ways: a folder with `config.json` and `model.safetensors` (fp32).

The official code keeps queries, keys and values apart; here they are one projection, so three of its tensors are one
of ours. Everything else is a renaming.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import Architecture, CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding

PREFIX = "vit_nepa."
_FIXED = {  # fields of config.json that describe what this code always does
    "num_channels": 3,
    "qkv_bias": True,
    "qk_norm_bias": False,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
}


def _names(architecture: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our name, official names) of every parameter of the backbone; several official ones are stacked."""
    yield "embedding.cls_token", ("embeddings.cls_token",)
    for kind in ("weight", "bias"):
        yield f"embedding.{kind}", (f"embeddings.patch_embeddings.projection.{kind}",)
        yield f"norm.{kind}", (f"layernorm.{kind}",)
    for n in range(architecture.depth):
        ours, official = f"blocks.{n}.", f"encoder.layer.{n}."
        for kind in ("weight", "bias"):
            inner = f"{official}attention.attention."
            yield f"{ours}attention.qkv.{kind}", tuple(f"{inner}{part}.{kind}" for part in ("query", "key", "value"))
            yield f"{ours}attention.out.{kind}", (f"{official}attention.output.dense.{kind}",)
            yield f"{ours}attention_norm.{kind}", (f"{official}layernorm_before.{kind}",)
            yield f"{ours}mlp_norm.{kind}", (f"{official}layernorm_after.{kind}",)
            yield f"{ours}mlp.up.{kind}", (f"{official}intermediate.up_proj.{kind}",)
            yield f"{ours}mlp.down.{kind}", (f"{official}output.dense.{kind}",)
            if architecture.gated:
                yield f"{ours}mlp.gate.{kind}", (f"{official}intermediate.gate_proj.{kind}",)
        if architecture.qk_norm == "affine":
            yield f"{ours}attention.query_norm.weight", (f"{official}attention.attention.q_norm.weight",)
            yield f"{ours}attention.key_norm.weight", (f"{official}attention.attention.k_norm.weight",)
        if architecture.layer_scale is not None:
            yield f"{ours}attention_scale", (f"{official}layer_scale.lambda1",)
            yield f"{ours}mlp_scale", (f"{official}output.layer_scale.lambda1",)


def model_config_from_official(official: dict[str, Any]) -> ModelConfig:
    """Our configuration of the backbone that an official `config.json` describes.

    Raises:
        ConfigError: a field asks for something this backbone does not do.
    """
    for field, expected in _FIXED.items():
        if field in official and official[field] != expected:
            raise ConfigError(f"config.json: {field}={official[field]!r} is not supported, only {expected!r}")
    gated = bool(official.get("use_gated_mlp", False))
    activation = official.get("hidden_act", "gelu")
    if activation != ("silu" if gated else "gelu"):
        raise ConfigError(f"config.json: hidden_act={activation!r} with use_gated_mlp={gated} is not supported")
    qk_norm = "none"
    if official.get("qk_norm", False):
        qk_norm = "affine" if official.get("qk_norm_affine", True) else "plain"
    try:
        return ModelConfig(
            width=official["hidden_size"],
            depth=official["num_hidden_layers"],
            heads=official["num_attention_heads"],
            mlp_width=official["intermediate_size"],
            patch_size=official["patch_size"],
            image_size=official["image_size"],
            mlp="swiglu" if gated else "gelu",
            rope_theta=official.get("rope_theta", 100.0),
            rope_rescale=official.get("pos_embed_rescale") or 1.0,
            qk_norm=qk_norm,
            layer_scale=official.get("layerscale_value"),
            drop_path=official.get("drop_path_prob", 0.0),
            init_std=official.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"config.json lacks the field {error}") from error


def backbone_from_official(architecture: Architecture, tensors: dict[str, Tensor], prefix: str = PREFIX) -> CausalViT:
    """The backbone with the official tensors in place.

    Raises:
        ConfigError: a tensor is missing, left over or of another shape; it is named, and never filled in.
    """
    backbone = CausalViT(architecture)
    remaining = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for ours, officials in _names(architecture):
            missing = [name for name in officials if name not in remaining]
            if missing:
                raise ConfigError(f"the weights lack {prefix}{missing[0]}, which config.json calls for")
            value = torch.cat([tensors[prefix + name] for name in officials])
            if value.shape != parameters[ours].shape:
                raise ConfigError(
                    f"{prefix}{officials[0]} gives {tuple(value.shape)}, config.json calls for "
                    f"{tuple(parameters[ours].shape)}"
                )
            parameters[ours].copy_(value)
            remaining -= set(officials)
    if remaining:
        raise ConfigError(f"the weights hold {prefix}{min(remaining)}, for which config.json has no place")
    return backbone
