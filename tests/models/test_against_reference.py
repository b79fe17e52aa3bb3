"""Outputs, loss and gradients against an independent formulation, on weights under which every part counts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding, next_embedding_loss
from tests.models import reference
from tests.models.reference import Settings

TINY: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "patch_size": 4, "image_size": 12}


def build(seed: int = 0, mask_token: bool = False, **model: Any) -> CausalViT:
    backbone = CausalViT(resolve_architecture(ModelConfig(**{**TINY, **model}), mask_token))
    reference.randomize(backbone, seed)
    return backbone


def settings_of(backbone: CausalViT, **more: Any) -> Settings:
    a = backbone.architecture
    return Settings(
        patch_size=a.patch_size,
        heads=a.heads,
        depth=a.depth,
        gated=a.gated,
        rope=a.rope,
        rope_theta=a.rope_theta,
        qk_norm=a.qk_norm,
        layer_scale=a.layer_scale is not None,
        **more,
    )


def images_for(backbone: CausalViT, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *backbone.architecture.image_size, generator=torch.Generator().manual_seed(1))


def assert_same(backbone: CausalViT, settings: Settings) -> None:
    """Embeddings and predictions to 1e-5, loss and every gradient to 1e-6."""
    images = images_for(backbone)
    rope_scale = None if settings.rope_scale == 1.0 else torch.tensor(settings.rope_scale)
    out = NextEmbedding(backbone, ObjectiveConfig(causal=settings.causal))(images, rope_scale=rope_scale)
    out["loss"].backward()

    weights = reference.weights_of(backbone)
    embeddings, predictions = reference.forward(weights, images, settings)
    loss = reference.loss(embeddings, predictions)
    loss.backward()

    torch.testing.assert_close(out["embeddings"].double(), embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(out["predictions"].double(), predictions, rtol=0, atol=1e-5)
    torch.testing.assert_close(out["loss"].double(), loss, rtol=0, atol=1e-6)
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(),
            weights[name].grad,
            rtol=0,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("layer_scale", [1e-5, None])
@pytest.mark.parametrize("qk_norm", ["none", "plain", "affine"])
@pytest.mark.parametrize(("rope", "rope_scale"), [(True, 1.0), (True, 0.61), (False, 1.0)])
@pytest.mark.parametrize("causal", [True, False])
def test_every_combination_of_switches(
    causal: bool, rope: bool, rope_scale: float, qk_norm: str, layer_scale: float | None, mlp: str
) -> None:
    backbone = build(rope=rope, qk_norm=qk_norm, layer_scale=layer_scale, mlp=mlp)
    assert_same(backbone, settings_of(backbone, causal=causal, rope_scale=rope_scale))


@pytest.mark.parametrize(
    "model",
    [
        {"mlp_width": 37},
        {"mlp_width": 85, "mlp": "swiglu"},
        {"image_size": [8, 20]},
        {"image_size": [20, 8]},
        {"image_size": 16, "patch_size": 8},
        {"image_size": 14, "patch_size": 7},
        {"image_size": 5, "patch_size": 1},
        {"image_size": 6, "patch_size": 6},  # a single patch
        {"width": 24, "heads": 6},  # head width 4: one frequency per axis
        {"width": 36, "heads": 3},  # head width 12
        {"width": 30, "heads": 3, "rope": False},  # a head width that rotation could not split
        {"depth": 1},
        {"depth": 4},
        {"rope_theta": 10_000.0},
    ],
    ids=str,
)
def test_every_geometry(model: dict[str, Any]) -> None:
    backbone = build(**{"qk_norm": "affine", **model})
    assert_same(backbone, settings_of(backbone))


def test_images_of_another_size_than_the_configured_one() -> None:
    backbone = build(qk_norm="affine")
    images = torch.randn(2, 3, 8, 24)
    _, predictions = backbone(images)
    _, expected = reference.forward(reference.weights_of(backbone), images, settings_of(backbone))
    torch.testing.assert_close(predictions.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_mask_token(causal: bool) -> None:
    backbone = build(qk_norm="affine", mask_token=True)
    images = images_for(backbone)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    embeddings, predictions = backbone(images, causal=causal, mask=mask)
    next_embedding_loss(embeddings, predictions).backward()

    weights = reference.weights_of(backbone)
    settings = settings_of(backbone, causal=causal)
    expected_embeddings, expected = reference.forward(weights, images, settings, mask)
    reference.loss(expected_embeddings, expected).backward()

    torch.testing.assert_close(embeddings.double(), expected_embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(predictions.double(), expected, rtol=0, atol=1e-5)
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=0, atol=1e-6)


BASE = {"qk_norm": "affine"}


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"rope": False},
        {"rope_scale": 1.01},
        {"rope_theta": 101.0},
        {"qk_norm": "none"},
        {"qk_norm": "plain"},
        {"layer_scale": False},
        {"depth": 1},
    ],
    ids=str,
)
def test_the_comparison_sees_every_switch(change: dict[str, Any]) -> None:
    """On these weights a wrong switch moves the output by much more than the tolerance."""
    backbone = build(**BASE)
    _, predictions = backbone(images_for(backbone))
    wrong = dataclasses.replace(settings_of(backbone), **change)
    _, expected = reference.forward(reference.weights_of(backbone), images_for(backbone), wrong)
    assert (predictions.double() - expected).abs().max() > 1e-3


def test_the_comparison_sees_every_parameter() -> None:
    """Each parameter's gradient is far above the tolerance."""
    for mlp, qk_norm in itertools.product(["gelu", "swiglu"], ["none", "plain", "affine"]):
        backbone = build(mlp=mlp, qk_norm=qk_norm)
        NextEmbedding(backbone, ObjectiveConfig())(images_for(backbone))["loss"].backward()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 3e-5, name
