"""The pretraining loss: its arithmetic, and that each switch of the objective does what it claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding, draw_rope_scale, next_embedding_loss, random_mask
from nepa_scale.profiling.live_tensors import LiveTensors
from tests.models.reference import randomize
from tests.models.test_against_reference import TINY


def task(mask_ratio: float = 0.0, dtype: torch.dtype = torch.float32, **objective: Any) -> NextEmbedding:
    architecture = resolve_architecture(ModelConfig(**TINY, qk_norm="plain"), mask_token=mask_ratio > 0)
    backbone = CausalViT(architecture, dtype)
    randomize(backbone)
    return NextEmbedding(backbone, ObjectiveConfig(mask_ratio=mask_ratio, **objective))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_cosine(targets: Tensor, predictions: Tensor) -> float:
    """In float64, pair by pair."""
    pairs = zip(targets.double().flatten(0, 1), predictions.double().flatten(0, 1), strict=True)
    return sum((a @ b / (a.norm() * b.norm())).item() for a, b in pairs) / (targets.shape[0] * targets.shape[1])


# shift and targets


def test_each_position_predicts_the_next_embedding() -> None:
    embeddings, predictions = random(3, 5, 8), random(3, 5, 8, seed=1)
    loss = next_embedding_loss(embeddings, predictions)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-mean_cosine(embeddings[:, 1:], predictions[:, :-1]), abs=1e-6)
    perfect = torch.cat([3.0 * embeddings[:, 1:], predictions[:, -1:]], dim=1)
    assert next_embedding_loss(embeddings, perfect).item() == pytest.approx(-1.0)


def test_cls_is_no_target_and_the_last_prediction_is_unused() -> None:
    embeddings, predictions = random(2, 5, 8), random(2, 5, 8, seed=1)
    loss = next_embedding_loss(embeddings, predictions)
    other_embeddings, other_predictions = embeddings.clone(), predictions.clone()
    other_embeddings[:, 0] = random(2, 8, seed=2)
    other_predictions[:, -1] = random(2, 8, seed=3)
    assert torch.equal(next_embedding_loss(other_embeddings, other_predictions), loss)
    for token in range(1, 5):
        changed = embeddings.clone()
        changed[:, token] = random(2, 8, seed=2)
        assert not torch.equal(next_embedding_loss(changed, predictions), loss)


def test_without_shift_each_patch_predicts_itself() -> None:
    embeddings, predictions = random(2, 5, 8), random(2, 5, 8, seed=1)
    loss = next_embedding_loss(embeddings, predictions, shift=False)
    assert loss.item() == pytest.approx(-mean_cosine(embeddings[:, 1:], predictions[:, 1:]), abs=1e-6)
    assert next_embedding_loss(embeddings, embeddings, shift=False).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("shift", [True, False])
def test_the_task_follows_the_switch(shift: bool) -> None:
    out = task(shift=shift)(random(2, 3, 12, 12))
    expected = next_embedding_loss(out["embeddings"], out["predictions"], shift=shift)
    assert torch.equal(out["loss"], expected)
    assert not torch.equal(out["loss"], next_embedding_loss(out["embeddings"], out["predictions"], shift=not shift))


# stop-gradient and causality


def test_stop_gradient_keeps_the_loss_and_cuts_the_targets() -> None:
    predictions = random(2, 5, 8, seed=1)
    losses = []
    for stop_gradient in (True, False):
        embeddings = random(2, 5, 8).requires_grad_()
        predicted = predictions.clone().requires_grad_()
        loss = next_embedding_loss(embeddings, predicted, stop_gradient=stop_gradient)
        loss.backward()
        losses.append(loss.item())
        assert predicted.grad is not None
        assert predicted.grad[:, :-1].abs().sum() > 0
        if stop_gradient:
            assert embeddings.grad is None
        else:
            assert embeddings.grad is not None
            assert embeddings.grad[:, 0].abs().max() == 0  # CLS
            assert embeddings.grad[:, 1:].abs().amin(dim=-1).min() > 0
    assert losses[0] == losses[1]


def test_stop_gradient_removes_exactly_the_path_through_the_targets() -> None:
    """In the model, where the embedding is also the input and still learns through it."""
    images = random(2, 3, 12, 12)
    gradients = []
    for stop_gradient in (True, False):
        module = task(stop_gradient=stop_gradient)
        module(images)["loss"].backward()
        gradients.append(module.backbone.embedding.weight.grad)
    module = task()
    out = module(images)
    next_embedding_loss(out["embeddings"], out["predictions"].detach(), stop_gradient=False).backward()
    through_targets = module.backbone.embedding.weight.grad
    assert gradients[0].abs().max() > 1e-3
    assert through_targets.abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0] + through_targets, rtol=1e-4, atol=1e-6)


def test_causal_switch() -> None:
    images = random(2, 3, 12, 12)
    later = images.clone()
    later[:, :, 8:, 8:] += 1.0  # the last patch
    for causal in (True, False):
        module = task(causal=causal)
        before, after = (module(x)["predictions"][:, :-1] for x in (images, later))
        assert ((before - after).abs().max() < 1e-6) == causal


# precision


def near_pair(dtype: torch.dtype, cosine: float = 0.9947) -> tuple[Tensor, Tensor]:
    """Embeddings and predictions [4, 65, 768] whose shifted cosines are all near `cosine`."""
    embeddings = random(4, 65, 768)
    noise = random(4, 64, 768, seed=1) * math.sqrt(1 / cosine**2 - 1)
    predictions = torch.cat([embeddings[:, 1:] + noise, random(4, 1, 768, seed=2)], dim=1)
    return embeddings.to(dtype), predictions.to(dtype)


def bf16_arithmetic(embeddings: Tensor, predictions: Tensor) -> float:
    targets = F.normalize(embeddings[:, 1:].bfloat16(), dim=-1)
    return -(F.normalize(predictions[:, :-1].bfloat16(), dim=-1) * targets).sum(-1).mean().item()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cosine_is_computed_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    embeddings, predictions = near_pair(dtype)
    exact = -mean_cosine(embeddings[:, 1:], predictions[:, :-1])
    assert exact == pytest.approx(-0.9947, abs=2e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = next_embedding_loss(embeddings, predictions)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, abs=1e-6)
    assert abs(bf16_arithmetic(embeddings, predictions) - exact) > 1e-4  # so the line above can fail


def test_the_gradient_is_computed_in_fp32() -> None:
    """Near a cosine of 1 the gradient is a small difference of large terms: of bf16 arithmetic little would be left."""
    embeddings, predictions = near_pair(torch.bfloat16, cosine=0.9999)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        predicted = predictions.to(dtype, copy=True).requires_grad_()
        if dtype == torch.bfloat16:
            next_embedding_loss(embeddings, predicted).backward()
        else:
            (-F.cosine_similarity(predicted[:, :-1], embeddings[:, 1:].double(), dim=-1).mean()).backward()
        gradients.append(predicted.grad.double())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 5e-3  # what is left is the rounding of the gradient itself to the inputs' dtype


def test_bf16_vectors_are_cast_some_images_at_a_time() -> None:
    """The same gradient, bit for bit but for a few, without float32 copies of all vectors."""
    embeddings = random(100, 9, 64).bfloat16()
    predictions = (embeddings.roll(-1, 1) + random(100, 9, 64, seed=1)).bfloat16()
    gradients, losses = [], []
    for loss_of in (next_embedding_loss, cosine_at_once):
        leaf = predictions.clone().requires_grad_()
        with LiveTensors() as live:
            live.claim([embeddings, leaf], "given")
            loss = loss_of(embeddings, leaf)
            (loss / 3).backward()
        gradients.append(leaf.grad)
        losses.append((loss.item(), live.peak_total - live.peak["given"]))
    (ours, memory), (expected, memory_at_once) = losses
    assert ours == pytest.approx(expected, abs=1e-6)
    assert (gradients[0] == gradients[1]).float().mean() > 0.999
    assert memory < 0.5 * memory_at_once


def cosine_at_once(embeddings: Tensor, predictions: Tensor) -> Tensor:
    return -F.cosine_similarity(predictions[:, :-1].float(), embeddings[:, 1:].float(), dim=-1).mean()


def test_a_bf16_model_has_an_fp32_loss() -> None:
    images = random(2, 3, 12, 12)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = task(dtype=torch.bfloat16)(images)
        assert out["predictions"].dtype == torch.bfloat16
        assert out["loss"].dtype == torch.float32
        exact = -mean_cosine(out["embeddings"][:, 1:], out["predictions"][:, :-1])
        assert out["loss"].item() == pytest.approx(exact, abs=1e-6)


# masking


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.5, 0.6, 0.99])
@pytest.mark.parametrize("patches", [1, 9, 256])
def test_exactly_the_asked_share_is_masked(patches: int, ratio: float) -> None:
    mask = random_mask(torch.arange(50), patches, ratio)
    assert mask.shape == (50, patches)
    assert mask.dtype == torch.bool
    assert (mask.sum(dim=1) == round(ratio * patches)).all()


def test_the_mask_is_a_function_of_the_key_alone() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    mask = random_mask(keys, 196, 0.4)
    assert torch.equal(random_mask(keys, 196, 0.4), mask)
    assert torch.equal(random_mask(keys.flip(0), 196, 0.4), mask.flip(0))
    assert torch.equal(random_mask(keys[10:20], 196, 0.4), mask[10:20])
    assert (random_mask(keys + 1, 196, 0.4) != mask).any(dim=1).all()


def test_masks_have_no_favourite_patch() -> None:
    count = 20_000
    share = random_mask(torch.arange(count), 16, 0.5).float().mean(dim=0)
    assert (share - 0.5).abs().max() < 5 * 0.5 / count**0.5


def test_equal_scores_still_mask_exactly_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(keys: Tensor, *_: int | str, count: int = 1) -> Tensor:
        return torch.zeros(len(keys), count)

    monkeypatch.setattr("nepa_scale.objectives.next_embedding.uniform", equal)
    assert random_mask(torch.arange(3), 40, 0.25).tolist() == [[patch < 10 for patch in range(40)]] * 3


def test_masked_patches_are_hidden_from_the_input_but_stay_the_target() -> None:
    module = task(mask_ratio=0.4)
    images, keys = random(4, 3, 12, 12), torch.arange(4)
    mask = random_mask(keys, 9, 0.4)
    out = module(images, sample_keys=keys)
    assert torch.equal(out["embeddings"], module.backbone.embedding(images, torch.float32))
    assert torch.equal(out["loss"], next_embedding_loss(out["embeddings"], out["predictions"]))
    pixels = mask.view(4, 1, 3, 3).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    other = module(torch.where(pixels, images + 1.0, images), sample_keys=keys)
    assert torch.equal(other["predictions"], out["predictions"])
    assert not torch.equal(other["loss"], out["loss"])
    visible = module(torch.where(pixels, images, images + 1.0), sample_keys=keys)
    assert (visible["predictions"] - out["predictions"]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_the_mask_token_learns_and_cls_is_never_masked() -> None:
    module = task(mask_ratio=0.99)
    assert module.backbone.mask_token is not None
    module(random(2, 3, 12, 12), sample_keys=torch.arange(2))["loss"].backward()
    assert module.backbone.mask_token.weight.grad.abs().max() > 0
    assert module.backbone.embedding.cls_token.grad.abs().max() > 0
    assert module.backbone.embedding.weight.grad.abs().max() == 0  # all patches hidden, targets under stop-gradient


def test_evaluation_masks_nothing() -> None:
    module, images = task(mask_ratio=0.6), random(2, 3, 12, 12)
    plain = task()
    plain.backbone.load_state_dict(module.backbone.state_dict(), strict=False)
    assert torch.equal(module(images)["loss"], plain(images)["loss"])


def test_masking_needs_a_mask_token() -> None:
    with pytest.raises(ConfigError, match="mask token"):
        NextEmbedding(task().backbone, ObjectiveConfig(mask_ratio=0.4))


# rotary rescaling


def test_rope_scale_is_log_uniform_and_a_function_of_its_words() -> None:
    draws = torch.tensor([draw_rope_scale(2.0, 0, step) for step in range(4000)]).log2()
    assert draws.min() >= -1
    assert draws.max() <= 1
    histogram = draws.histc(10, -1, 1) / len(draws)
    assert (histogram - 0.1).abs().max() < 5 * (0.09 / len(draws)) ** 0.5
    assert draw_rope_scale(2.0, 0, 17) == draw_rope_scale(2.0, 0, 17)
    assert draw_rope_scale(2.0, 0, 17) != draw_rope_scale(2.0, 1, 17)
    assert {draw_rope_scale(1.0, 0, step) for step in range(10)} == {1.0}


def test_units_are_the_embedding_and_the_blocks() -> None:
    module = task()
    assert module.units == [module.backbone.embedding, *module.backbone.blocks]
