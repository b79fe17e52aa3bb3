"""Decay groups by name, the schedule, and how batches are spread."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nepa_scale.config import ConfigError, ModelConfig, TrainConfig, load_config
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.sharding.strategy import set_hyperparameters
from nepa_scale.training.batching import plan_batches
from nepa_scale.training.optimization import pretraining_groups
from nepa_scale.training.schedule import (
    Schedule,
    average_decay,
    learning_rate,
    peak_learning_rate,
    total_steps,
    warmup_steps,
    weight_decay,
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


IJEPA = Path("../shared/oracles/ijepa.pt")


@pytest.mark.skipif(not IJEPA.is_file(), reason="the oracle is not part of the repository")
@pytest.mark.parametrize(("kind", "total"), [("small", 35.0), ("scaled", 43.75)])
def test_decays_follow_the_official_schedules_of_jepa(kind: str, total: float) -> None:
    oracle = torch.load(IJEPA, weights_only=True)
    theirs = [float(value) for value in oracle[f"schedule/{kind}/ema_.996_1"]]
    assert [average_decay(s, start=0.996, end=1.0, total=total) for s in range(35)] == pytest.approx(theirs, abs=1e-15)
    theirs = [float(value) for value in oracle[f"schedule/{kind}/weight_decay_.04_.4"]]
    ours = [weight_decay(s, start=0.04, end=0.4, total=int(total)) for s in range(35)]
    assert ours == pytest.approx(theirs, abs=1e-15)


def test_a_run_has_the_decays_of_its_configuration() -> None:
    words = ["train.steps=4", "optimizer.weight_decay=0.04", "ema.decay=0.996"]
    groups = pretraining_groups(["head.weight", "norm.bias"], 0.04)
    schedule = Schedule.of(load_config(None, words), 10)
    assert [schedule.average_decay(step) for step in (0, 3)] == [0.996, 0.996]
    assert [schedule.weight_decays(step, groups) for step in (0, 3)] == [[0.04, 0.0], [0.04, 0.0]]
    schedule = Schedule.of(load_config(None, [*words, "ema.decay_end=1.0"]), 10)
    assert [schedule.average_decay(step) for step in range(4)] == pytest.approx([0.996, 0.997, 0.998, 0.999])
    groups = pretraining_groups(["head.weight", "norm.bias"], 0.04, lambda _: 0.5, 0.4)
    assert schedule.weight_decays(1, groups) == pytest.approx([0.22 / 0.5, 0.0])
    assert schedule.weight_decays(3, groups) == pytest.approx([0.4 / 0.5, 0.0])
    with pytest.raises(ConfigError, match="needs a moving average"):
        load_config(None, ["ema.decay=0", "ema.decay_end=1.0"])


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


def test_an_optimizer_takes_the_decays_of_the_step() -> None:
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [second], "number": 1}, {"params": [first], "number": 0}]  # as ZeRO-3 splits and reorders them
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    first.grad = second.grad = torch.zeros(1)
    set_hyperparameters(optimizer, [0.1, 0.01], [2.0, 3.0])
    optimizer.step()
    assert (first.item(), second.item()) == pytest.approx((1 - 0.1 * 2.0, 1 - 0.01 * 3.0))
    set_hyperparameters(optimizer, 0.5, None)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 3.0), (0.5, 2.0)]
