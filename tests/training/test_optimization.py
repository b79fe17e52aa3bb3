"""Decay groups by name, the schedule, and how batches are spread."""

from __future__ import annotations

import math

import pytest
import torch

from nepa_scale.config import ConfigError, ModelConfig, TrainConfig, load_config
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.training.batching import plan_batches
from nepa_scale.training.optimization import (
    learning_rate,
    peak_learning_rate,
    pretraining_groups,
    total_steps,
    warmup_steps,
)


def test_only_matrices_patch_embedding_and_tokens_decay() -> None:
    with torch.device("meta"):
        model = CausalViT(resolve_architecture(ModelConfig(depth=1, qk_norm="affine", mlp="swiglu"), mask_token=True))
    decayed, others = pretraining_groups([name for name, _ in model.named_parameters()], 0.05)
    assert (decayed.weight_decay, others.weight_decay) == (0.05, 0.0)
    assert set(decayed.names) == {
        "embedding.weight",
        "embedding.cls_token",
        "mask_token.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.mlp.gate.weight",
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight",
    }
    assert len(decayed.names) + len(others.names) == len(list(model.named_parameters()))


def test_learning_rate_follows_warmup_and_cosine() -> None:
    rates = [learning_rate(s, peak=2.0, warmup=10, total=110, final_fraction=0.1) for s in range(111)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[110] == pytest.approx(0.2)
    assert max(rates) == rates[10]
    assert learning_rate(0, peak=1.0, warmup=0, total=5, final_fraction=0.0) == 1.0


def test_released_recipe_in_numbers() -> None:
    """nepa: 3e-4 x 4096 / 256 = 4.8e-3, 40 of 1600 epochs of warmup."""
    config = load_config("configs/pretrain/vit_b14.yaml")
    steps = 1281167 // 4096
    assert peak_learning_rate(config) == pytest.approx(4.8e-3)
    assert warmup_steps(config, steps) == 40 * steps
    assert total_steps(config, steps) == 1600 * steps
    assert (config.optimizer.betas, config.optimizer.eps) == ([0.9, 0.95], 1e-8)
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.ema.decay) == (0.05, 1.0, 0.9999)
    assert config.data.crop_scale == [0.08, 1.0]
    assert math.isclose(config.data.crop_ratio[1], 4 / 3)


def test_steps_or_epochs_not_both() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        total_steps(load_config(None), 10)
    with pytest.raises(ConfigError, match="exactly one"):
        total_steps(load_config(None, ["train.steps=5", "train.epochs=1"]), 10)
    assert total_steps(load_config(None, ["train.epochs=2.5"]), 10) == 25


@pytest.mark.parametrize(("world", "micro", "expected"), [(1, None, (12, 1)), (2, 3, (3, 2)), (3, 1, (1, 4))])
def test_batches_divide(world: int, micro: int | None, expected: tuple[int, int]) -> None:
    plan = plan_batches(TrainConfig(global_batch_size=12, micro_batch_size=micro), world)
    assert (plan.micro_batch_size, plan.accumulation) == expected


def test_impossible_batches_name_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"5 ranks; nearest that do: 10, 15"):
        plan_batches(TrainConfig(global_batch_size=12), 5)
    with pytest.raises(ConfigError, match=r"that do: 1, 2, 3, 4, 6, 12"):
        plan_batches(TrainConfig(global_batch_size=12, micro_batch_size=5), 1)
