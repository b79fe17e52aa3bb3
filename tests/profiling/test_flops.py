"""Four counters, one number: for every size and every switch of the architecture, to the FLOP."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nepa_scale.config import CHOICES, ConfigError, JepaConfig, MaeConfig, ModelConfig, ObjectiveConfig, load_config
from nepa_scale.models import SIZES, CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.profiling import count_flops, forward_flops, train_flops
from nepa_scale.profiling.counters import (
    ElementwiseCounter,
    count_all,
    deepspeed_forward,
    fvcore_forward,
    torch_forward,
    torch_pretext,
    torch_training,
)
from nepa_scale.profiling.flops import ADAMW_OPERATIONS, EMA_OPERATIONS, backward_flops, kernel_flops, recomputed_flops
from nepa_scale.training.pretraining import Pretraining

KERNEL_RECOMPUTES = {"meta": 0, "cpu": 1}  # whether the attention of the device computes its scores twice
SMALL = {"size": "vit_ti", "depth": 2, "image_size": [56, 28]}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu"},
    {"qk_norm": "none"},
    {"qk_norm": "affine"},
    {"layer_scale": None},
    {"rope": False},
    {"drop_path": 0.2},
    {"patch_size": 7},
    {"patch_size": 16, "image_size": [32, 80]},
    {"image_size": 14},
    {"width": 60, "heads": 3, "mlp_width": 101, "depth": 3},
    {"mlp": "swiglu", "qk_norm": "affine", "layer_scale": None, "image_size": [28, 70]},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [2, pytest.param(None, marks=pytest.mark.slow)])  # None: the size's own
def test_all_counters_agree_at_every_size(size: str, depth: int | None) -> None:
    architecture = resolve_architecture(ModelConfig(size=size, depth=depth))
    closed = forward_flops(architecture)
    assert count_all(architecture) == {"torch": closed, "fvcore": closed, "deepspeed": closed}


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_all_counters_agree_whatever_the_architecture(switches: dict[str, Any]) -> None:
    architecture = resolve_architecture(ModelConfig(**SMALL | switches))
    closed = forward_flops(architecture)
    assert count_all(architecture) == {"torch": closed, "fvcore": closed, "deepspeed": closed}


@pytest.mark.parametrize("count", [torch_forward, fvcore_forward, deepspeed_forward])
def test_counters_see_attention_and_convolution_on_the_host_too(count: Any) -> None:
    architecture = resolve_architecture(ModelConfig(**SMALL))
    assert count(architecture, "cpu") == forward_flops(architecture)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_backward_is_counted_at_every_size(size: str, depth: int | None) -> None:
    architecture = resolve_architecture(ModelConfig(size=size, depth=depth))
    seen = torch_training(architecture)
    assert seen.forward == sum(forward_flops(architecture).values())
    assert seen.forward + seen.backward == train_flops(architecture)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_backward_with_recomputation_is_counted(switches: dict[str, Any], recompute: str, device: str) -> None:
    architecture = resolve_architecture(ModelConfig(**SMALL | switches))
    seen = torch_training(architecture, recompute, device, drop_path_keys=True)
    expected = backward_flops(architecture), recomputed_flops(architecture, recompute)
    kernel = KERNEL_RECOMPUTES[device] * sum(kernel_flops(architecture).values())
    assert seen.forward == sum(forward_flops(architecture).values())
    assert seen.backward == sum(sum(part.values()) for part in expected) + kernel


def test_optimizer_operations_are_counted() -> None:
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([parameter], foreach=False, weight_decay=0.05)
    average = torch.zeros(1000)
    for _ in range(2):
        parameter.grad = torch.ones(1000)
        with ElementwiseCounter() as counter:
            optimizer.step()
            average.lerp_(parameter.detach(), 0.1)
    assert counter.total == 1000 * (ADAMW_OPERATIONS + EMA_OPERATIONS)


def test_published_figures() -> None:
    assert count_flops("vit_b", patch_size=16).flops_per_image == 35_126_120_448
    assert round(count_flops("vit_b").flops_per_image / 1e9, 3) == 46.322
    assert round(count_flops("vit_l").flops_per_image / 1e9, 3) == 162.024
    assert count_flops("vit_l", qk_norm="affine").parameters == 302_967_808


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_modules(size: str) -> None:
    with torch.device("meta"):
        task = NextEmbedding(CausalViT(resolve_architecture(ModelConfig(size=size))), ObjectiveConfig())
    assert count_flops(size).parameters == sum(p.numel() for p in task.parameters())


def test_halving_touches_attention_alone_and_only_where_it_is_causal() -> None:
    full = count_flops("vit_s", recompute="full")
    half = full.halved()
    for name in ("forward", "backward", "recomputed", "kernel"):
        whole, part = getattr(full, name), getattr(half, name)
        assert part["scores"] * 2 == whole["scores"] > 0
        assert {k: v for k, v in part.items() if k != "scores"} == {k: v for k, v in whole.items() if k != "scores"}
    bidirectional = count_flops("vit_s", causal=False)
    assert bidirectional.halved() == bidirectional


def test_model_flops_do_not_depend_on_recomputation_and_hardware_flops_do() -> None:
    none, selective, full = (count_flops("vit_b", recompute=mode) for mode in ("none", "selective", "full"))
    assert none.train_flops_per_image == selective.train_flops_per_image == full.train_flops_per_image
    assert none.hardware_flops_per_image < selective.hardware_flops_per_image < full.hardware_flops_per_image
    blocks = full.flops_per_image - full.forward["embedding"]
    assert full.hardware_flops_per_image - none.hardware_flops_per_image == blocks


def test_steps_and_runs_are_multiples() -> None:
    count = count_flops("vit_ti", global_batch_size=64, images=640)
    facts = count.to_json()
    assert facts["model_flops_per_step"] == 64 * facts["train_flops_per_image"]
    assert facts["model_flops_of_run"] == 10 * facts["model_flops_per_step"]
    assert dataclasses.replace(count, images=None).to_json()["model_flops_of_run"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "vit_x"}, "did you mean 'vit_"),
        ({"recompute": "ful"}, "did you mean 'full'"),
        ({"image_size": 225}, "224"),
    ],
)
def test_what_cannot_be_says_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        count_flops(**arguments)


# other objectives

PRETEXTS = [
    ObjectiveConfig(name="mae"),
    ObjectiveConfig(name="mae", mae=MaeConfig(hidden=0.5, width=64, depth=3)),
    ObjectiveConfig(name="jepa"),
    ObjectiveConfig(name="jepa", jepa=JepaConfig(width=96, depth=1)),
]
MODELS: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu", "qk_norm": "affine", "layer_scale": None},
    {"layer_scale": None, "drop_path": 0.2, "patch_size": 8, "image_size": [64, 96]},
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", PRETEXTS)
def test_the_step_of_other_objectives(objective: ObjectiveConfig, model: dict[str, Any], recompute: str) -> None:
    architecture = resolve_architecture(ModelConfig(**{"size": "vit_ti", "depth": 3, "image_size": 112} | model))
    seen = torch_pretext(architecture, objective, recompute)
    assert seen.forward == sum(forward_flops(architecture, objective).values())
    backward = sum(backward_flops(architecture, objective).values())
    assert seen.backward == backward + sum(recomputed_flops(architecture, recompute, objective).values())


@pytest.mark.parametrize("objective", [PRETEXTS[1], PRETEXTS[3]])
def test_the_step_of_other_objectives_on_the_host(objective: ObjectiveConfig) -> None:
    architecture = resolve_architecture(ModelConfig(size="vit_ti", depth=2, image_size=70))
    seen = torch_pretext(architecture, objective, "none", "cpu")
    assert seen.forward + seen.backward == train_flops(architecture, objective) + sum(
        kernel_flops(architecture, objective).values()
    )


def test_what_other_objectives_have_beside_the_backbone() -> None:
    plain, mae, jepa = (count_flops("vit_b", objective=ObjectiveConfig(name=n)) for n in CHOICES["objective.name"])
    assert [count.backbone_forwards for count in (plain, mae, jepa)] == [1, 1, 2]
    assert [count.backbone_tokens for count in (plain, mae, jepa)] == [257, 65, 58]
    assert (list(plain.shares), list(mae.shares), list(jepa.shares)) == ([], ["decoder"], ["predictor", "teacher"])
    assert plain.pretraining_only == 0
    for count in (mae, jepa):
        module = Pretraining(load_config(None, [f"objective.name={count.objective.name}"]))
        assert count.parameters == module.parameters == plain.parameters + count.pretraining_only
        assert count.halved() is count
    # the teacher is a forward pass of the whole backbone, which nothing follows
    assert jepa.forward["teacher"] == plain.flops_per_image
    assert jepa.backward["teacher"] == 0
    with pytest.raises(ConfigError, match="did you mean 'jepa'"):
        count_flops(objective=ObjectiveConfig(name="ijepa"))
