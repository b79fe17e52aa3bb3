"""Predicted memory against autograd's hooks, to the byte, and against the live tensors of the real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import SIZES, CausalViT, initialize_module, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.profiling import predict_memory
from nepa_scale.profiling.activations import (
    Shape,
    block_activations,
    ends_activations,
    full_activations,
    selective_activations,
)
from nepa_scale.profiling.live_tensors import LiveTensors
from nepa_scale.profiling.memory import predict
from nepa_scale.profiling.memory_measured import measure
from nepa_scale.profiling.setup import Setup
from nepa_scale.sharding.recompute import recompute_units

SWITCHES: list[dict[str, Any]] = [
    {}, {"mlp": "swiglu"}, {"qk_norm": "none"}, {"qk_norm": "affine"}, {"layer_scale": None}, {"rope": False},
    {"rope": False, "qk_norm": "none"}, {"patch_size": 7}, {"width": 60, "heads": 3, "mlp_width": 101},
]  # fmt: skip


def task_of(model: ModelConfig, precision: str) -> NextEmbedding:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    task = NextEmbedding(CausalViT(resolve_architecture(model), dtype), ObjectiveConfig())
    initialize_module(task, task.backbone.architecture, 0)
    return task.train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_autograd_keeps_what_the_formulas_say(switches: dict[str, Any], precision: str) -> None:
    task = task_of(ModelConfig(**{"size": "vit_ti", "depth": 3, "image_size": [56, 28]} | switches), precision)
    images = torch.zeros(2, 3, 56, 28)
    with LiveTensors() as live:
        live.claim([*task.parameters(), images], "given")
        with live.saving("saved"):
            outputs = task(images, rope_scale=torch.ones(()))
    shape = Shape(task.backbone.architecture, 2, precision, cast=True)
    expected = 3 * sum(block_activations(shape).values()) + sum(ends_activations(shape).values())
    assert live.now["saved"] == expected
    assert outputs["loss"].requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("recompute", "formula"), [("selective", selective_activations), ("full", full_activations)])
def test_recomputation_keeps_what_the_formulas_say(recompute: str, formula: Any, precision: str) -> None:
    """By the growth from one depth to the next, in which all that is not of the blocks drops out."""
    sizes = []
    for depth in (2, 3):
        task = task_of(ModelConfig(size="vit_ti", depth=depth, image_size=56), precision)
        recompute_units(task, recompute)
        with LiveTensors() as live:
            live.claim(task.parameters(), "given")
            outputs = task(torch.zeros(2, 3, 56, 56), rope_scale=torch.ones(()))
        sizes.append(live.total - live.now["given"])
        del outputs
    expected = sum(formula(Shape(task.backbone.architecture, 2, precision, cast=True)).values())
    assert sizes[1] - sizes[0] == pytest.approx(expected, rel=0.01)


def test_live_tensors_count_a_storage_once_and_forget_it_when_it_ends() -> None:
    with LiveTensors() as live:
        tensor = torch.zeros(1000)
        view = tensor.view(10, 100)[2:]
        assert live.total == 4000
        other = tensor + 1
        assert live.total == live.peak_total == 8000
        del other, tensor
        assert live.total == 4000
        del view
        assert live.total == 0
        assert live.peak_total == 8000
        storage = torch.zeros(10).untyped_storage()
        storage.resize_(4000)  # no operator, as FSDP2 does
        assert live.total == 4000


MODEL = ModelConfig(size="vit_ti", image_size=56, depth=4)
COVERING = [
    Setup(MODEL, "single", 1, 8, "fp32", "none"),
    Setup(MODEL, "single", 1, 8, "bf16", "full"),
    Setup(MODEL, "ddp", 2, 8, "bf16", "none"),
    Setup(MODEL, "fsdp", 2, 8, "bf16", "full"),
    Setup(MODEL, "zero1", 2, 8, "bf16", "full"),
    Setup(MODEL, "zero2", 2, 8, "bf16", "none"),
    Setup(MODEL, "zero3", 2, 8, "bf16", "full"),
]


@pytest.mark.slow
def test_predicted_is_within_five_percent_of_measured() -> None:
    for setup, found in zip(COVERING, measure(COVERING), strict=True):
        assert predict(setup).total == pytest.approx(found["total"], rel=0.05), setup
        for kind in ("parameters", "moments", "masters", "ema"):
            assert predict(setup).components[kind] == pytest.approx(found.get(kind, 0), rel=0.01), (setup, kind)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_state_is_divided_by_the_ranks(size: str, strategy: str) -> None:
    one, many = (predict_memory(size, strategy=strategy, world_size=world) for world in (1, 64))
    for kind in ("moments", "ema"):
        assert many.components[kind] == pytest.approx(one.components[kind] / 64, rel=0.02)


def test_what_costs_memory_costs_more() -> None:
    def total(**settings: Any) -> int:
        return predict_memory("vit_l", **{"strategy": "fsdp", "world_size": 8, "micro_batch": 64} | settings).total

    assert total(recompute="full") < total(recompute="selective") < total(recompute="none")
    assert total(micro_batch=32) < total(micro_batch=64)
    assert total(ema=False) < total(ema=True)
    assert total(world_size=64) < total(world_size=8)
    assert total(precision="bf16") < total(precision="fp32")
    assert total(strategy="zero3", offload=True) < total(strategy="zero3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "zero4"}, "did you mean 'zero"),
        ({"strategy": "single", "world_size": 2}, "one process"),
        ({"strategy": "fsdp", "offload": True}, "offload is part of zero3"),
        ({"size": "vit_q"}, "did you mean"),
        ({"precision": "fp16"}, "fp32, bf16"),
    ],
)
def test_what_cannot_be_says_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict_memory(**settings)
