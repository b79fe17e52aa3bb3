"""Masked autoencoding: what is hidden, what the loss is of, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ConfigError, MaeConfig, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initialize_module, resolve_architecture
from nepa_scale.objectives import mae
from nepa_scale.objectives.mae import (
    MaskedAutoencoder,
    hidden_patches,
    hide,
    mae_decoder,
    normalized_pixels,
    pixels_of_patches,
)
from tests.launch import REPOSITORY
from tests.models.reference import randomize

SMALL = ModelConfig(width=48, depth=2, heads=3, patch_size=8, image_size=32, layer_scale=0.1)  # 16 patches


def task(dtype: torch.dtype = torch.float32, model: ModelConfig = SMALL, **mae: float | int) -> MaskedAutoencoder:
    backbone = CausalViT(resolve_architecture(model), dtype)
    module = MaskedAutoencoder(backbone, ObjectiveConfig(name="mae", mae=MaeConfig(**mae)))  # type: ignore[arg-type]
    randomize(module)
    return module


def photographs(count: int, seed: int = 0) -> Tensor:
    """Float32 [count, 3, 32, 32] in [-1, 1], smooth, so that a patch can be told from its neighbours."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (32, 32), mode="bilinear", align_corners=True)


def chosen(module: MaskedAutoencoder, keys: Tensor) -> tuple[Tensor, Tensor]:
    return hide(keys, 16, module.hidden)


def pixel_mask(patches: Tensor) -> Tensor:
    """int64 [B, K] of 16 patches of 8 x 8 pixels -> bool [B, 1, 32, 32]."""
    mask = torch.zeros(len(patches), 16, dtype=torch.bool).scatter(1, patches, True).view(-1, 1, 4, 4)
    return mask.repeat_interleave(8, 2).repeat_interleave(8, 3)


# what is hidden


@pytest.mark.parametrize(("patches", "hidden"), [(4, 3), (9, 7), (256, 192)])
def test_each_patch_is_either_visible_or_hidden(patches: int, hidden: int) -> None:
    visible, masked = hide(torch.arange(40), patches, hidden)
    assert masked.shape == (40, hidden)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(patches).expand(40, -1))


def test_what_is_hidden_is_a_function_of_the_key_alone() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    whole = hide(keys, 256, 192)
    for part, of_some in zip(whole, hide(keys[10:20], 256, 192), strict=True):
        assert torch.equal(of_some, part[10:20])
    assert (hide(keys + 1, 256, 192)[0] != whole[0]).any(1).all()


def test_no_patch_is_favoured() -> None:
    count = 20_000
    share = F.one_hot(hide(torch.arange(count), 16, 12)[1], 16).sum(1).float().mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / count) ** 0.5


def test_the_encoder_sees_no_hidden_pixel() -> None:
    module, images, keys = task(), photographs(3), torch.arange(3)
    before = module(images, sample_keys=keys)
    _, hidden = chosen(module, keys)
    after = module(torch.where(pixel_mask(hidden), images.flip(-1).flip(-2), images), sample_keys=keys)
    assert torch.equal(after["pixels"], before["pixels"])
    assert not torch.equal(after["loss"], before["loss"])
    shown = module(torch.where(pixel_mask(hidden), images, images * 0.5), sample_keys=keys)
    assert (shown["pixels"] - before["pixels"]).abs().amax((1, 2)).min() > 1e-4


def test_the_decoder_knows_which_patch_it_is_asked_for() -> None:
    module, images, keys = task(), photographs(2), torch.arange(2)
    visible, hidden = chosen(module, keys)
    _, seen = module.backbone(images, causal=False, visible=visible)
    told = module.decoder(seen, visible, hidden.unsqueeze(1), (4, 4), None)[:, 0]
    again = module.decoder(seen, visible, hidden.flip(1).unsqueeze(1), (4, 4), None)[:, 0]
    torch.testing.assert_close(again, told.flip(1))
    assert (told[:, 0] - told[:, 1]).abs().amax(1).min() > 1e-3


# the loss


def test_targets_are_patches_of_mean_0_and_variance_1() -> None:
    images = photographs(2)
    pixels = pixels_of_patches(images, 8)
    assert torch.equal(pixels[1, 6].view(3, 8, 8), images[1, :, 8:16, 16:24])  # the second row's third patch
    targets = normalized_pixels(images, 8)
    assert targets.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(targets.var(-1), torch.ones(2, 16), rtol=1e-2, atol=0)
    torch.testing.assert_close(normalized_pixels(images * 0.5 + 0.2, 8), targets, rtol=0, atol=2e-2)


def test_the_loss_is_of_the_hidden_patches_only() -> None:
    module, images, keys = task(), photographs(3), torch.arange(3)
    _, hidden = chosen(module, keys)
    out = module(images, sample_keys=keys)
    targets = normalized_pixels(images, 8)
    expected = sum(
        (out["pixels"][image, place].double() - targets[image, patch].double()).square().mean().item()
        for image in range(3)
        for place, patch in enumerate(hidden[image].tolist())
    )
    assert out["pixels"].shape == (3, 12, 192)
    assert out["loss"].item() == pytest.approx(expected / 36, rel=1e-5)


def test_a_bf16_model_has_an_fp32_loss() -> None:
    out = task(torch.bfloat16)(photographs(2), sample_keys=torch.arange(2))
    assert out["pixels"].dtype == torch.bfloat16
    assert out["loss"].dtype == torch.float32
    assert out["loss"].isfinite()


def test_evaluation_hides_nothing() -> None:
    module, images = task(), photographs(2)
    out = module(images)
    assert set(out) == {"predictions"}
    assert torch.equal(out["predictions"], module.backbone(images, causal=False)[1])


def test_it_learns_what_predicting_the_mean_cannot() -> None:
    module = task()
    initialize_module(module, module.backbone.architecture, seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    train, unseen = photographs(128), photographs(64, seed=1)
    for step in range(250):
        keys = torch.arange(16) + 16 * step
        module(train[keys % 128], sample_keys=keys)["loss"].backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = module(unseen, sample_keys=-torch.arange(1, 65))["loss"].item()
    assert loss < 0.85  # the mean's is 191 / 192


# shapes and mistakes


@pytest.mark.parametrize(
    ("size", "width", "depth"),
    [("vit_ti", 128, 8), ("vit_s", 256, 8), ("vit_b", 512, 8), ("vit_l", 512, 8), ("vit_7b", 512, 8)],
)
def test_the_decoder_is_the_published_one_from_vit_b_on(size: str, width: int, depth: int) -> None:
    own = mae_decoder(resolve_architecture(ModelConfig(size=size)), ObjectiveConfig(name="mae"))
    assert (own.width, own.depth, own.head_dim, own.mlp_width) == (width, depth, 32, 4 * width)


def test_its_size_can_be_given() -> None:
    module = task(width=96, depth=1)
    assert len(module.decoder.blocks) == 1
    assert module.decoder.embed.weight.shape == (96, 48)


def test_units_are_the_embedding_and_all_blocks() -> None:
    module = task()
    assert module.units == [module.backbone.embedding, *module.backbone.blocks, *module.decoder.blocks]


@pytest.mark.parametrize(
    ("model", "mae", "message"),
    [
        ({}, {"width": 40}, "objective.mae.width=40 is not a multiple of 32.*64"),
        ({"rope": False}, {}, "needs model.rope=true"),
        ({"base_width": 32}, {}, "leave out model.base_width"),
        ({"image_size": 8}, {}, "hides 1 of 1 patches"),
        ({}, {"hidden": 0.99}, "hides 16 of 16 patches"),
    ],
)
def test_what_cannot_be_is_said(model: dict[str, object], mae: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(model=dataclasses.replace(SMALL, **model), **mae)  # type: ignore[arg-type]


# the official code's values


def ours(values: Tensor) -> Tensor:
    """[B, N, 48], each patch by row, column and channel -> by channel, row and column."""
    return values.unflatten(2, (16, 3)).transpose(2, 3).flatten(2)


ORACLE = REPOSITORY.parent / "shared" / "oracles" / "mae.pt"
needs_oracle = pytest.mark.skipif(not ORACLE.is_file(), reason="the oracle is not part of the repository")


@needs_oracle
def test_the_numbers_of_hidden_patches_are_the_official_ones() -> None:
    oracle = torch.load(ORACLE, weights_only=True)
    encoder = resolve_architecture(SMALL)
    for patches, share, kept in [
        *((oracle["const/patches"], ratio, oracle[f"ratio_{ratio}/kept"]) for ratio in (0.75, 0.6)),
        *((patches, 0.75, oracle[f"kept_of_{patches}_at_.75"]) for patches in (64, 196, 256)),
        (64, 0.8, int(64 * (1 - 0.8))),  # 12.8: rounded down
    ]:
        side = 8 * int(patches**0.5)
        encoder = dataclasses.replace(encoder, image_size=(side, side))
        assert patches - hidden_patches(encoder, ObjectiveConfig(name="mae", mae=MaeConfig(share))) == kept


@needs_oracle
@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_targets_loss_and_gradient_are_the_official_ones(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = torch.load(ORACLE, weights_only=True)
    images, mask = oracle["images"].float(), oracle[f"ratio_{ratio}/mask"].bool()
    assert torch.equal(pixels_of_patches(oracle["patchify/index_image"], 4), ours(oracle["patchify/index_patches"]))
    torch.testing.assert_close(
        normalized_pixels(images, 4), ours(oracle["target_normalised"]).float(), rtol=2e-3, atol=5e-5
    )

    model = ModelConfig(width=48, depth=1, heads=3, patch_size=4, image_size=24)
    module = task(model=model, hidden=ratio)
    hidden = torch.stack([row.nonzero()[:, 0] for row in mask])
    visible = torch.stack([(~row).nonzero()[:, 0] for row in mask])
    assert hidden.shape[1] == module.hidden
    monkeypatch.setattr(mae, "hide", lambda *_: (visible, hidden))
    pred = ours(oracle["pred"]).float().requires_grad_()
    monkeypatch.setattr(
        module.decoder, "forward", lambda *_: pred.gather(1, hidden[..., None].expand(-1, -1, 48)).unsqueeze(1)
    )
    loss = module(images, sample_keys=torch.arange(3))["loss"]
    assert loss.item() == pytest.approx(oracle[f"ratio_{ratio}/normalised/loss"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(
        gradient, ours(oracle[f"ratio_{ratio}/normalised/grad_pred"]).float(), rtol=1e-4, atol=1e-7
    )
