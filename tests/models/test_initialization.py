"""Initial weights are a pure function of (seed, name), with the method's statistics."""

from __future__ import annotations

import pytest
import torch

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, build_vit, initial_values, initialize_module, resolve_architecture
from nepa_scale.objectives import Classifier, NextEmbedding

ARCHITECTURE = resolve_architecture(
    ModelConfig(width=64, depth=2, heads=4, patch_size=8, image_size=32, mlp="swiglu", qk_norm="affine"),
    mask_token=True,
)


def test_statistics_of_every_kind_of_parameter() -> None:
    backbone = CausalViT(ARCHITECTURE)
    initialize_module(backbone, ARCHITECTURE, seed=0)
    for name, parameter in backbone.named_parameters():
        values = parameter.detach()
        assert values.dtype == torch.float32
        if name.endswith("bias"):
            assert values.eq(0).all(), name
        elif name.endswith("norm.weight"):
            assert values.eq(1).all(), name
        elif name.endswith("_scale"):
            assert values.eq(1e-5).all(), name
        else:  # weights, CLS and mask token
            deviation = 0.02 / values.numel() ** 0.5
            assert abs(values.mean().item()) < 5 * deviation, name
            assert values.std().item() == pytest.approx(0.02, rel=5 / (2 * values.numel()) ** 0.5), name


def test_the_same_for_the_same_seed_and_name_whatever_the_order() -> None:
    one, two = (CausalViT(ARCHITECTURE) for _ in range(2))
    initialize_module(one, ARCHITECTURE, seed=7)
    for name, parameter in reversed(list(two.named_parameters())):
        parameter.data = initial_values(name, tuple(parameter.shape), ARCHITECTURE, seed=7)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(two.named_parameters())[name]), name


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first = build_vit("vit_ti", depth=1, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = build_vit("vit_ti", depth=1, seed=1)
    assert torch.equal(first.blocks[0].mlp.up.weight, second.blocks[0].mlp.up.weight)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_task_around_the_backbone_starts_from_the_same_weights() -> None:
    backbone = CausalViT(ARCHITECTURE)
    initialize_module(backbone, ARCHITECTURE, seed=3)
    for task in (NextEmbedding(CausalViT(ARCHITECTURE), ObjectiveConfig()), Classifier(CausalViT(ARCHITECTURE), 10)):
        initialize_module(task, ARCHITECTURE, seed=3)
        for name, parameter in backbone.named_parameters():
            assert torch.equal(parameter, dict(task.backbone.named_parameters())[name]), name
    assert task.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert task.fc_norm.weight.eq(1).all()


def test_seeds_and_names_give_unrelated_draws() -> None:
    shape = (64, 64)
    names = [f"blocks.{n}.attention.qkv.weight" for n in range(3)]
    draws = torch.stack([initial_values(n, shape, ARCHITECTURE, seed).flatten() for n in names for seed in (0, 1)])
    correlation = torch.corrcoef(draws) - torch.eye(6)
    assert correlation.abs().max() < 5 / 64


def test_a_parameter_of_an_unknown_kind_is_not_guessed() -> None:
    with pytest.raises(KeyError, match=r"blocks\.0\.mystery"):
        initial_values("blocks.0.mystery", (3,), ARCHITECTURE, 0)
