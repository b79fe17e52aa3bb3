"""What a base width and depth do to initial values and learning rates, and that activations then keep their scale."""

from __future__ import annotations

import pytest
import torch

from nepa_scale.config import Config, ModelConfig
from nepa_scale.models import Architecture, resolve_architecture
from nepa_scale.models.initialization import initial_values
from nepa_scale.models.transfer import initial_factor, rate_factor
from nepa_scale.scaling.coordinate_check import coordinate_check
from nepa_scale.training.pretraining import Pretraining


def architecture(layer_scale: float | None = 0.1, base: bool = True) -> Architecture:
    """Four times as wide and three times as deep as its base."""
    model = ModelConfig(width=128, depth=6, heads=4, patch_size=8, image_size=32, layer_scale=layer_scale)
    if base:
        model.base_width, model.base_depth = 32, 2
    return resolve_architecture(model)


@pytest.mark.parametrize(
    ("name", "initial", "rate"),
    [
        ("backbone.embedding.weight", 1, 1),
        ("backbone.embedding.cls_token", 1, 1),
        ("backbone.blocks.3.attention.qkv.weight", 1 / 2, 1 / 4),
        ("backbone.blocks.3.attention.qkv.bias", 1, 1),
        ("blocks.3.mlp.down.weight", 1 / 2, 1 / 4),
        ("blocks.3.mlp_norm.weight", 1, 1),
        ("blocks.3.attention.query_norm.weight", 1, 1),
        ("blocks.3.attention_scale", 1 / 3, 1 / 3),
        ("backbone.norm.weight", 1, 1),
    ],
)
def test_factors_by_name(name: str, initial: float, rate: float) -> None:
    assert initial_factor(name, architecture()) == pytest.approx(initial)
    assert rate_factor(name, architecture()) == pytest.approx(rate)
    assert initial_factor(name, architecture(base=False)) == rate_factor(name, architecture(base=False)) == 1


def test_without_layer_scale_the_last_matrix_takes_the_depth_in() -> None:
    plain = architecture(None)
    for owner in ("attention.out", "mlp.down"):
        assert rate_factor(f"blocks.0.{owner}.weight", plain) == pytest.approx(1 / 4 / 3)
        assert rate_factor(f"blocks.0.{owner}.bias", plain) == pytest.approx(1 / 3)
        assert initial_factor(f"blocks.0.{owner}.weight", plain) == pytest.approx(1 / 2 / 3)
    assert rate_factor("blocks.0.attention.qkv.weight", plain) == pytest.approx(1 / 4)


def test_initial_values_are_the_same_draws_scaled() -> None:
    for name, shape in (("blocks.1.mlp.up.weight", (512, 128)), ("blocks.1.mlp_scale", (128,))):
        scaled, plain = (initial_values(name, shape, one, seed=3) for one in (architecture(), architecture(base=False)))
        torch.testing.assert_close(scaled, plain * initial_factor(name, architecture()))


def test_a_run_learns_at_these_rates_and_decays_at_the_same() -> None:
    config = Config(model=ModelConfig(width=128, depth=6, heads=4, patch_size=8, image_size=32, base_width=32))
    task = Pretraining(config)
    names = [name for name, _ in task.build().named_parameters()]
    groups = task.groups(names)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    for group in groups:
        for name in group.names:
            assert group.lr_scale == pytest.approx(rate_factor(name, task.architecture))
        assert group.weight_decay == 0 or group.weight_decay * group.lr_scale == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("along", "sizes", "limit"), [("width", [64, 128, 256, 512], 0.05), ("depth", [2, 4, 8], 0.1)])
def test_activations_keep_their_scale(along: str, sizes: list[int], limit: float) -> None:
    """Over 8 times the width: slopes of log activation against log size; without transfer they are near 1."""
    check = coordinate_check(sizes, along=along)
    assert abs(check.steepest) < limit, check.slopes
    assert coordinate_check(sizes[:3], along=along, transferred=False).steepest > 0.5
