"""The table of sizes, what a configuration resolves to, and what it is refused for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nepa_scale.config import ConfigError, ModelConfig
from nepa_scale.models import SIZES, CausalViT, build_vit, resolve_architecture, size_name
from nepa_scale.objectives import Classifier


def meta_backbone(**model: Any) -> CausalViT:
    with torch.device("meta"):
        return CausalViT(resolve_architecture(ModelConfig(**model)))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ({"size": "vit_b", "qk_norm": "none"}, 85_527_552),
        ({"size": "vit_b", "qk_norm": "plain"}, 85_527_552),
        ({"size": "vit_b", "qk_norm": "affine"}, 85_529_088),
        ({"size": "vit_l", "qk_norm": "plain"}, 302_964_736),
        ({"size": "vit_l", "qk_norm": "affine"}, 302_967_808),
        ({"size": "vit_b", "mlp": "swiglu"}, 113_875_968),
        ({"size": "vit_b", "mlp": "swiglu", "mlp_width": 2048}, 85_539_840),
        ({"size": "vit_l", "mlp": "swiglu", "qk_norm": "affine"}, 403_729_408),
        ({"size": "vit_l", "mlp": "swiglu", "qk_norm": "affine", "mlp_width": 2730}, 302_951_392),
    ],
    ids=str,
)
def test_parameter_counts_of_the_released_models(model: dict[str, Any], count: int) -> None:
    assert parameters(meta_backbone(**model)) == count


@pytest.mark.parametrize(("size", "count"), [("vit_b", 86_299_624), ("vit_l", 303_994_856)])
def test_parameter_counts_of_the_released_classifiers(size: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(Classifier(meta_backbone(size=size, qk_norm="affine"), 1000)) == count


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(size: str, patch_size: int) -> None:
    backbone = meta_backbone(size=size, patch_size=patch_size)
    row = SIZES[size]
    assert len(backbone.blocks) == row.depth
    assert backbone.architecture.head_dim * row.heads == row.width
    assert backbone.architecture.tokens == 1 + (224 // patch_size) ** 2
    embeddings, predictions = backbone(torch.empty(2, 3, 224, 224, device="meta"))
    assert embeddings.shape == predictions.shape == (2, backbone.architecture.tokens, row.width)
    assert row.source


def test_sizes_grow() -> None:
    counts = {size: parameters(meta_backbone(size=size)) for size in SIZES}
    assert list(counts.values()) == sorted(counts.values())
    for size, billions in {"vit_1b": 1, "vit_3b": 3, "vit_7b": 7}.items():
        assert counts[size] / 1e9 == pytest.approx(billions, rel=0.25)


def test_explicit_numbers_override_the_size() -> None:
    architecture = resolve_architecture(ModelConfig(size="vit_s", depth=5, heads=4))
    assert (architecture.width, architecture.depth, architecture.heads, architecture.mlp_width) == (384, 5, 4, 1536)
    wider = resolve_architecture(ModelConfig(size="vit_s", width=96, heads=4))
    assert wider.mlp_width == 4 * 96
    odd = resolve_architecture(ModelConfig(size="vit_s", width=96, heads=4, mlp_width=101))
    assert odd.mlp_width == 101


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"size": "vit_l"}, "vit_l"),
        ({"size": "vit_l", "patch_size": 16, "qk_norm": "none"}, "vit_l"),
        ({"size": "vit_b", "width": 192, "heads": 3}, "vit_ti"),  # whatever it was called, it is that
        ({"size": "vit_ti", "width": 96}, "width 96 x depth 12 x heads 3"),
        ({"size": "vit_ti", "depth": 4}, "width 192 x depth 4 x heads 3"),
        ({"size": "vit_ti", "heads": 6}, "width 192 x depth 12 x heads 6"),
        ({"size": "vit_ti", "mlp_width": 512}, "width 192 x depth 12 x heads 3 x MLP 512"),
    ],
)
def test_a_size_is_named_only_where_it_is_that_size(model: dict[str, Any], name: str) -> None:
    assert size_name(resolve_architecture(ModelConfig(**model))) == name


def test_grid_of_an_image_that_is_not_square() -> None:
    architecture = resolve_architecture(ModelConfig(image_size=[28, 56], patch_size=14))
    assert (architecture.grid, architecture.tokens) == ((2, 4), 9)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"size": "vit_bb"}, ["unknown model.size=vit_bb", "did you mean 'vit_b'?", "vit_7b"]),
        ({"size": "vit_s", "heads": 5}, ["model.width=384", "model.heads=5", "heads that do: 1, 2, 3, 4, 6, 8, 12"]),
        ({"image_size": 225}, ["model.image_size=225", "model.patch_size=14", "224, 238"]),
        ({"image_size": [224, 230]}, ["model.image_size=230", "224, 238"]),
        ({"image_size": 8}, ["model.image_size=8", "14"]),
        ({"image_size": [1, 2, 3]}, ["[height, width]"]),
        ({"width": 30, "heads": 3}, ["head width that 4 divides", "is 10", "model.rope=false"]),
        ({"depth": 0}, ["model.depth=0 must be at least 1"]),
        ({"width": 64, "heads": 0}, ["model.heads=0 must be at least 1"]),
        ({"mlp_width": -1}, ["model.mlp_width=-1 must be at least 1"]),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused_with_what_would(model: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_architecture(ModelConfig(**model))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_build_vit() -> None:
    backbone = build_vit("vit_ti", patch_size=8, image_size=(16, 32), seed=5, depth=2, qk_norm="none")
    embeddings, predictions = backbone(torch.zeros(3, 3, 16, 32))
    assert embeddings.shape == predictions.shape == (3, 9, 192)
    assert predictions.isfinite().all()
    with pytest.raises(ConfigError, match="patch_size=8"):
        build_vit("vit_ti", patch_size=8, image_size=(16, 30))
