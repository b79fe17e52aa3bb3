"""Joint embedding: what the student sees, what it is taught, and that it learns without collapsing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ConfigError, JepaConfig, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initialize_module, resolve_architecture
from nepa_scale.objectives import jepa, pretext_diagnostics
from nepa_scale.objectives.blocks import draw_blocks
from nepa_scale.objectives.jepa import JointEmbedding, jepa_predictor
from tests.launch import REPOSITORY
from tests.models.reference import randomize

SMALL = ModelConfig(width=48, depth=2, heads=3, patch_size=8, image_size=40, layer_scale=0.1)  # 5 x 5 patches
KEYS = torch.arange(3)


def task(dtype: torch.dtype = torch.float32, model: ModelConfig = SMALL, **jepa: int) -> JointEmbedding:
    backbone = CausalViT(resolve_architecture(model), dtype)
    module = JointEmbedding(backbone, ObjectiveConfig(name="jepa", jepa=JepaConfig(**jepa)))
    randomize(module)
    return module


def photographs(count: int, seed: int = 0) -> Tensor:
    """Float32 [count, 3, 40, 40] in [-1, 1], smooth."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (40, 40), mode="bilinear", align_corners=True)


def taught(count: int = 3) -> Tensor:
    return torch.randn(count, 26, 48, generator=torch.Generator().manual_seed(2))


def test_the_loss_is_of_normalised_targets_at_the_blocks() -> None:
    module = task()
    out = module(photographs(3), sample_keys=KEYS, taught=taught())
    _, blocks = draw_blocks(KEYS, module.layout)
    assert out["told"].shape == out["targets"].shape == (3, 16, 48)
    for image in range(3):
        for place, patch in enumerate(blocks[image].flatten().tolist()):
            row = taught()[image, 1 + patch]
            expected = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
            torch.testing.assert_close(out["targets"][image, place], expected, rtol=1e-4, atol=1e-5)
    difference = (out["told"] - out["targets"]).abs()
    expected = torch.where(difference < 1, 0.5 * difference.square(), difference - 0.5).mean()
    torch.testing.assert_close(out["loss"], expected)


def test_the_student_sees_the_context_only() -> None:
    module, images = task(), photographs(3)
    context, _ = draw_blocks(KEYS, module.layout)
    shown = torch.zeros(3, 25, dtype=torch.bool).scatter(1, context, True).view(3, 1, 5, 5)
    shown = shown.repeat_interleave(8, 2).repeat_interleave(8, 3)
    told = module(images, sample_keys=KEYS, taught=taught())["told"]
    assert torch.equal(module(torch.where(shown, images, 0.3), sample_keys=KEYS, taught=taught())["told"], told)
    other = module(torch.where(shown, 0.5 * images, images), sample_keys=KEYS, taught=taught())["told"]
    assert (other - told).abs().amax((1, 2)).min() > 1e-3


def test_blocks_are_told_apart_and_each_by_itself() -> None:
    """Of a block that another overlaps, the same patches are told otherwise only by what else is asked for."""
    module, images = task(), photographs(3)
    context, blocks = draw_blocks(KEYS, module.layout)
    _, seen = module.backbone(images, causal=False, visible=context)
    alone = module.predictor(seen, context, blocks[:, 2:3], module.layout.grid, None)[:, 0]
    told = module(images, sample_keys=KEYS, taught=taught())["told"].view(3, 4, 4, 48)
    torch.testing.assert_close(alone, told[:, 2])
    assert (told[:, 2, 0] - told[:, 2, 1]).abs().amax(1).min() > 1e-3


def test_no_gradient_reaches_the_teacher() -> None:
    module, of_teacher = task(), taught().requires_grad_()
    module(photographs(3), sample_keys=KEYS, taught=of_teacher)["loss"].backward()
    assert of_teacher.grad is None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_bf16_model_has_an_fp32_loss() -> None:
    out = task(torch.bfloat16)(photographs(3), sample_keys=KEYS, taught=taught().bfloat16())
    assert out["told"].dtype == torch.bfloat16
    assert (out["loss"].dtype, out["targets"].dtype) == (torch.float32, torch.float32)


def test_without_keys_it_is_the_backbone() -> None:
    module, images = task(), photographs(2)
    assert torch.equal(module(images)["predictions"], module.backbone(images, causal=False)[1])


def test_it_learns_and_its_targets_stay_apart() -> None:
    module, teacher = task(width=48), task(width=48)
    initialize_module(module, module.backbone.architecture, seed=0)
    teacher.load_state_dict(module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    train, losses = photographs(128), []
    for step in range(120):
        keys = torch.arange(16) + 16 * step
        images = train[keys % 128]
        with torch.no_grad():
            outputs = teacher(images)["predictions"]
        out = module(images, sample_keys=keys, taught=outputs)
        losses.append(out["loss"].item())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), module.parameters(), strict=True):
                average.lerp_(weight, 0.02)
    found = pretext_diagnostics(out)
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert found["target_cosine"] < 0.9
    assert found["effective_rank"] > 4


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [("vit_ti", 96, 6, 3), ("vit_s", 192, 6, 6), ("vit_b", 384, 6, 12), ("vit_l", 384, 12, 16), ("vit_h", 384, 12, 16),
     ("vit_3b", 384, 12, 24)],
)  # fmt: skip
def test_the_predictor_is_the_published_one_from_vit_b_on(size: str, width: int, depth: int, heads: int) -> None:
    """With the encoder's number of heads, as in the official code."""
    own = jepa_predictor(resolve_architecture(ModelConfig(size=size)), ObjectiveConfig(name="jepa"))
    assert (own.width, own.depth, own.heads, own.head_dim) == (width, depth, heads, width // heads)


@pytest.mark.parametrize(
    ("model", "jepa", "message"),
    [
        ({"image_size": 32}, {}, "no target blocks in a grid of 4 x 4"),
        ({}, {"width": 33}, "objective.jepa.width=33 is not a multiple of 12.*36"),
        ({"rope": False}, {}, "needs model.rope=true"),
    ],
)
def test_what_cannot_be_is_said(model: dict[str, object], jepa: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(model=dataclasses.replace(SMALL, **model), **jepa)  # type: ignore[arg-type]


ORACLE = REPOSITORY.parent / "shared" / "oracles" / "ijepa.pt"


@pytest.mark.skipif(not ORACLE.is_file(), reason="the oracle is not part of the repository")
def test_targets_loss_and_gradient_are_the_official_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = torch.load(ORACLE, weights_only=True)
    module = task(model=ModelConfig(width=32, depth=1, heads=2, patch_size=4, image_size=32))
    blocks = torch.stack([oracle[f"target_indices/{block}"] for block in range(4)], dim=1)
    monkeypatch.setattr(jepa, "draw_blocks", lambda *_: (oracle["context_indices"], blocks))
    told = oracle["predictions"].float().requires_grad_()
    # theirs are block by block, all images of each
    monkeypatch.setattr(module.predictor, "forward", lambda *_: told.unflatten(0, (4, 3)).transpose(0, 1))
    taught = F.pad(oracle["teacher_outputs"].float(), (0, 0, 1, 0))  # CLS, which theirs has not
    out = module(torch.rand(3, 3, 32, 32), sample_keys=torch.arange(3), taught=taught)
    targets = oracle["targets"].float().unflatten(0, (4, 3)).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(out["targets"], targets, rtol=1e-4, atol=1e-5)
    assert out["loss"].item() == pytest.approx(oracle["loss"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(out["loss"], told)
    torch.testing.assert_close(gradient, oracle["grad_predictions"].float(), rtol=1e-4, atol=1e-8)
