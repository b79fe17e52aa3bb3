"""Arithmetic of the parts: two ways to embed patches, precision of the residual stream, drop path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nepa_scale.config import ModelConfig
from nepa_scale.counter_random import uniform
from nepa_scale.models import CausalViT, initialize_module, resolve_architecture
from nepa_scale.models.layers import Block, convolve_patches, drop_path_factors, drop_path_rates, multiply_patches
from tests.models.reference import randomize
from tests.models.test_against_reference import TINY, build, images_for


def test_patches_as_a_convolution_and_as_a_product_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 14, 28, generator=generator)
    weight, bias = torch.randn(16, 3, 7, 7, generator=generator), torch.randn(16, generator=generator)
    convolved, multiplied = convolve_patches(images, weight, bias), multiply_patches(images, weight, bias)
    assert convolved.shape == multiplied.shape == (2, 8, 16)
    torch.testing.assert_close(convolved, multiplied, rtol=0, atol=1e-4)


def test_images_that_do_not_divide_into_patches() -> None:
    with pytest.raises(ValueError, match="12 x 13 pixels do not divide into patches of 4"):
        build()(torch.randn(1, 3, 12, 13))


def test_evaluation_under_inference_mode_leaves_training_usable() -> None:
    """The table of rotary angles is kept between calls; made under inference mode, it must still take gradients."""
    backbone = build(rope_theta=77.0)
    images = images_for(backbone)
    with torch.inference_mode():
        backbone(images)
    backbone(images, rope_scale=torch.tensor(1.5))[1].sum().backward()


# precision


def tiny_bf16(layer_scale: float | None = 1e-5) -> CausalViT:
    architecture = resolve_architecture(ModelConfig(**TINY, qk_norm="affine", layer_scale=layer_scale))
    backbone = CausalViT(architecture, dtype=torch.bfloat16)
    randomize(backbone)
    return backbone


def stream(backbone: CausalViT, images: Tensor) -> list[Tensor]:
    """What enters the first block and leaves each."""
    states: list[Tensor] = []
    first = backbone.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    hooks = [first, *(b.register_forward_hook(lambda _, __, out: states.append(out)) for b in backbone.blocks)]
    with torch.no_grad():
        backbone(images)
    for hook in hooks:
        hook.remove()
    return states


def test_layer_scale_updates_survive_bf16() -> None:
    """An update of 1e-5 on values near 1 is a thousand times finer than bf16: only an fp32 stream keeps it."""
    backbone = tiny_bf16()
    with torch.no_grad():
        for block in backbone.blocks:
            block.attention_scale.fill_(1e-5)
            block.mlp_scale.fill_(1e-5)
    images = images_for(backbone)
    half = stream(backbone, images)
    assert {state.dtype for state in half} == {torch.float32}
    backbone.dtype = torch.float32
    full = stream(backbone, images)
    for layer in range(len(backbone.blocks)):
        update, exact = half[layer + 1] - half[layer], full[layer + 1] - full[layer]
        assert (update - exact).norm() < 0.05 * exact.norm()
        rounded = (half[layer].bfloat16() + update.bfloat16()) - half[layer].bfloat16()
        assert (rounded == 0).float().mean() > 0.9  # what a bf16 stream would have kept of it: next to nothing


def test_bf16_outputs_and_fp32_gradients() -> None:
    backbone = tiny_bf16()
    embeddings, predictions = backbone(images_for(backbone))
    assert embeddings.dtype == predictions.dtype == torch.bfloat16
    predictions.float().sum().backward()
    assert {parameter.grad.dtype for parameter in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("layer_scale", [1e-5, None])
def test_the_dtype_in_which_parameters_arrive_makes_no_difference(layer_scale: float | None) -> None:
    """fp32 masters cast at use (one process, DDP) and bf16 copies of them (FSDP2, ZeRO) give the same bits."""
    masters = tiny_bf16(layer_scale)
    copies = tiny_bf16(layer_scale).to(torch.bfloat16)
    images = images_for(masters)
    for ours, theirs in zip(masters(images), copies(images), strict=True):
        assert torch.equal(ours, theirs)


# drop path


def test_drop_path_keeps_the_expectation() -> None:
    rate, count = 0.3, 20_000
    first, last = drop_path_factors(torch.arange(count), drop_path_rates(rate, 2))
    assert first is None
    assert last is not None
    assert last.shape == (2, count, 1, 1)
    for factors in last:
        kept = factors > 0
        assert kept.float().mean().item() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / count) ** 0.5)
        assert factors[kept].unique().tolist() == pytest.approx([1 / (1 - rate)])


def test_drop_path_factors_are_those_of_uniform() -> None:
    keys = torch.arange(9) * 7919
    factors = drop_path_factors(keys, [0.0, 0.4])[1]
    assert factors is not None
    for drawn, branch in zip(factors.flatten(1), ("attention", "mlp"), strict=True):
        assert torch.equal(drawn > 0, uniform(keys, "drop_path", branch, 1).flatten() >= 0.4)


@pytest.mark.parametrize(("branch", "other"), [("attention", "mlp"), ("mlp", "attention")])
def test_a_factor_multiplies_its_branch(branch: str, other: str) -> None:
    block = Block(16, 2, 32, gated=False, qk_norm="none", layer_scale=True)
    randomize(block)
    with torch.no_grad():
        getattr(block, f"{other}_scale").zero_()
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    factors = torch.ones(2, 3, 1, 1)
    factors[("attention", "mlp").index(branch)] = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    with torch.no_grad():
        plain = block(x, None, True, torch.float32, None) - x
        scaled = block(x, None, True, torch.float32, factors) - x
    torch.testing.assert_close(scaled, plain * torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1), rtol=1e-5, atol=1e-5)


def test_drop_path_is_a_function_of_the_sample_alone() -> None:
    backbone = build(drop_path=0.5, depth=4).train()
    images = images_for(backbone, batch=16)
    keys = torch.arange(16) * 7919
    _, predictions = backbone(images, sample_keys=keys)
    _, again = backbone(images, sample_keys=keys)
    assert torch.equal(predictions, again)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    _, permuted = backbone(images[order], sample_keys=keys[order])
    torch.testing.assert_close(permuted, predictions[order])
    _, alone = backbone(images[3:5], sample_keys=keys[3:5])
    torch.testing.assert_close(alone, predictions[3:5])
    _, others = backbone(images, sample_keys=keys + 1)
    assert (others - predictions).abs().amax(dim=(1, 2)).gt(1e-3).float().mean() > 0.5


def test_drop_path_draws_branches_and_layers_apart() -> None:
    """Which samples keep a branch, over branches and layers: uncorrelated rows."""
    count = 4096
    factors = [each for each in drop_path_factors(torch.arange(count), [0.5, 0.5]) if each is not None]
    rows = (torch.stack(factors).view(4, count) > 0).float()
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 5 / count**0.5


def test_drop_path_is_off_in_evaluation_and_without_keys() -> None:
    backbone = build(drop_path=0.5)
    plain = build(drop_path=0.0)
    images, keys = images_for(backbone), torch.arange(2)
    with torch.no_grad():
        expected = plain(images)[1]
        assert torch.equal(backbone.eval()(images, sample_keys=keys)[1], expected)
        assert torch.equal(backbone.train()(images)[1], expected)


def test_drop_path_grows_linearly_with_depth() -> None:
    assert drop_path_rates(0.2, 5) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1) == [0.0]


def test_initialization_fills_whatever_was_there() -> None:
    backbone = build()
    initialize_module(backbone, backbone.architecture, seed=3)
    assert backbone.blocks[0].attention_scale.eq(1e-5).all()
