"""The model does what timm's programs ask of it, as timm's own VisionTransformer does."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import nepa_scale.interop.timm
from nepa_scale.config import ConfigError
from nepa_scale.models.layers import Block

TINY: dict[str, Any] = {"width": 48, "depth": 3, "heads": 3, "layer_scale": 0.1, "img_size": 32, "patch_size": 8}
NAME = "nepa_vit_base_patch16_224"
# what timm 1.0's train.py hands to create_model with its default arguments, and what its validate.py does
TRAIN: dict[str, Any] = {
    "pretrained": False, "in_chans": 3, "num_classes": 4, "drop_rate": 0.0, "drop_path_rate": None,
    "drop_block_rate": None, "global_pool": None, "bn_momentum": None, "bn_eps": None, "scriptable": False,
    "checkpoint_path": "",
}  # fmt: skip
VALIDATE: dict[str, Any] = {"pretrained": False, "num_classes": None, "in_chans": 3, "global_pool": None}
NAMES = (
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_block_rate",
    "dynamic_img_size", "bn_momentum", "bn_eps", "bn_tf", "scriptable",
)  # fmt: skip


def make(**options: Any) -> Any:
    return timm.create_model(NAME, **(TINY | {"num_classes": 4} | options))


def reference() -> Any:
    """timm's own, of the same shape."""
    return timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=4
    ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_what_asks_for_nothing_is_taken_and_anything_else_refused_by_name(name: str) -> None:
    for nothing in (None, 0, 0.0, False):
        make(**{name: nothing})
        if name != "scriptable":
            nepa_scale.interop.timm.NepaVisionTransformer(**TINY, **{name: nothing})
    with pytest.raises(ConfigError, match=f"^{name}="):
        make(**{name: True if name in ("scriptable", "bn_tf", "dynamic_img_size") else 0.1})


def test_an_argument_that_nobody_has_is_named() -> None:
    make(exportable=True)
    with pytest.raises(ConfigError, match=r"^embed_dim, rop: these models have no such argument; .*rope_theta"):
        make(embed_dim=3, rop=True)


def test_a_loop_as_in_timms_training_script(images: Tensor, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(NAME, **TRAIN, **TINY)
    model.get_classifier().weight.data.mul_(0.5)
    model.set_grad_checkpointing(enable=True)
    data = resolve_data_config({}, model=model)
    assert create_transform(**data, is_training=True)
    assert create_transform(**data)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.5**4, 0.5**3, 0.5**2, 0.5, 1.0}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(
        group["weight_decay"] == 0 or all(parameter.ndim > 1 for parameter in group["params"])
        for group in optimizer.param_groups
    )
    average = ModelEmaV3(model, decay=0.5)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10, warmup_epochs=1)
    labels, criterion = torch.tensor([0, 1]), LabelSmoothingCrossEntropy(0.1)
    losses = []
    model.train()
    for epoch in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=epoch)
        schedule.step(epoch + 1)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert not torch.equal(average.module.head.weight, model.head.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth")
    validated = timm.create_model(NAME, **(VALIDATE | {"num_classes": 4}), **TINY)
    load_checkpoint(validated, str(tmp_path / "last.pth"))
    assert torch.equal(validated.eval()(images), model.eval()(images))


def test_recomputed_blocks_give_the_same_gradients(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *inputs: calls.append(self) or forward(self, *inputs))
    model = make(drop_path_rate=0.3).train()

    def gradients(enable: bool) -> list[Tensor]:
        torch.manual_seed(1)
        calls.clear()
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).logsumexp(1).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients(False)
    assert len(calls) == 3
    recomputed = gradients(True)
    assert len(calls) == 6
    assert all(torch.equal(one, other) for one, other in zip(kept, recomputed, strict=True))
    with torch.no_grad():
        model(images)
    assert len(calls) == 9


def test_drop_path_drops_in_training_only(images: Tensor) -> None:
    model = make(drop_path_rate=0.9)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_adapt_to_other_channels_as_timms_do(channels: int) -> None:
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    assert make(in_chans=channels)(images).shape == (2, 4)
    model = make().eval()
    overlay = {"state_dict": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    adapted = make(in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay | {"num_classes": 4}).eval()
    weight = model.backbone.embedding.weight
    expected = (
        weight.sum(1, keepdim=True) if channels == 1 else torch.cat([weight, weight[:, :1]], 1) * 3 / channels
    )  # timm's rule: one channel sums; more repeat, and keep the sum
    assert torch.allclose(adapted.backbone.embedding.weight, expected)
    assert torch.equal(adapted.head.weight, model.head.weight)


def structure(value: Any) -> Any:
    """Types, keys and shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    return type(value), [structure(item) for item in value]


@pytest.mark.parametrize("indices", [None, 1, 2, 3, (0, 2), (2, 0), [-1], (-3, 1), (1, 1)])
def test_intermediates_are_shaped_as_timms(indices: Any, images: Tensor) -> None:
    ours, theirs = make().eval(), reference()
    switches = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    for values in itertools.product((False, True), repeat=5):
        for output_fmt in ("NCHW", "NLC"):
            options = dict(zip(switches, values, strict=True)) | {"output_fmt": output_fmt, "indices": indices}
            expected = structure(theirs.forward_intermediates(images, **options))
            assert structure(ours.forward_intermediates(images, **options)) == expected, options


def test_intermediates_are_the_outputs_of_the_blocks(images: Tensor) -> None:
    model = make().eval()
    outputs: list[Tensor] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    final, taken = model.forward_intermediates(images, indices=(2, 0), output_fmt="NLC")
    assert torch.equal(taken[0], outputs[0][:, 1:])  # from the first on, whatever the order of the indices
    assert torch.equal(taken[1], outputs[2][:, 1:])
    assert torch.equal(final, model.forward_features(images))
    outputs.clear()
    found = model.forward_intermediates(
        images, indices=[0, 1], norm=True, stop_early=True, output_dict=True, return_prefix_tokens=True
    )
    assert len(outputs) == 2
    norm = model.backbone.norm
    normalized = norm(outputs[0])
    assert torch.equal(found["image_intermediates"][0], normalized[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    assert torch.equal(found["image_intermediates_prefix"][0], normalized[:, :1])
    assert torch.equal(found["image_features"], norm(outputs[1]))


@pytest.mark.parametrize("indices", [(3,), (-4,), 4, 0, (0, 12)])
def test_an_index_out_of_range_is_an_error_as_in_timm(indices: Any, images: Tensor) -> None:
    for model in (make(), reference()):
        for call in (lambda model: model.forward_intermediates(images, indices=indices),
                     lambda model: model.prune_intermediate_layers(indices)):  # fmt: skip
            with pytest.raises(AssertionError, match="out of range"):
                call(model)


def test_pruning_removes_what_is_not_needed(images: Tensor) -> None:
    model = make(drop_path_rate=0.1)
    whole = sum(parameter.numel() for parameter in model.parameters())
    before = copy.deepcopy(model).eval().forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(model.backbone.blocks) == 2
    assert isinstance(model.backbone.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    block = sum(parameter.numel() for parameter in model.backbone.blocks[0].parameters())
    left = sum(parameter.numel() for parameter in model.parameters())
    assert whole - left == block + 2 * 48 + 2 * 48 + 4 * 49
    after = model.eval().forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert model.train()(images).shape == (2, 17, 48)  # drop path knows the rates of the blocks that are left


@pytest.mark.parametrize("out_indices", [None, (1,), (0, 2), (-1,), 2])
def test_features_only_gives_the_maps_of_the_blocks(out_indices: Any, images: Tensor) -> None:
    options = {} if out_indices is None else {"out_indices": out_indices}
    model = make(features_only=True, **options).eval()
    maps = model(images)
    wanted = {None: [0, 1, 2], (1,): [1], (0, 2): [0, 2], (-1,): [2], 2: [1, 2]}[out_indices]
    whole = make().eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(images, indices=wanted, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
    assert model.feature_info.channels() == [48] * len(wanted)
    assert model.feature_info.reduction() == [8] * len(wanted)
    assert len(model.model.backbone.blocks) == max(wanted) + 1


def test_features_of_a_block_that_is_not_there_are_refused() -> None:
    with pytest.raises(AssertionError, match="12 is out of range"):
        timm.create_model(NAME, features_only=True, out_indices=(12,), **(TINY | {"depth": 12}))


def test_bf16_parameters_compute_in_bf16(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    exact = model(images)
    dtypes = set()
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda *inputs: dtypes.update(x.dtype for x in inputs) or linear(*inputs)
    )
    rounded = model.to(torch.bfloat16)(images)
    assert dtypes == {torch.bfloat16}
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.allclose(model.float()(images), exact, atol=0.05)
    assert make(dtype=torch.bfloat16)(images).dtype == torch.bfloat16
    model.to(torch.bfloat16).reset_classifier(3)
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_traced_and_exported_models_compute_the_same(images: Tensor) -> None:
    fresh = make(rope_theta=77.0).eval()  # whose tables nobody has asked for yet
    exported = torch.export.export(fresh, (images,)).module()
    assert torch.allclose(exported(images), fresh(images), atol=1e-6)
    traced = torch.jit.trace(fresh, images)
    other = images.flip(0) + 1
    assert torch.allclose(traced(other), fresh(other), atol=1e-6)
    assert torch.allclose(exported(other), fresh(other), atol=1e-6)


def test_images_and_patches_of_another_size() -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.set_input_size(img_size=(48, 64))
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 4)
    smooth = nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=32, mode="bicubic")
    before = model(smooth)
    model.set_input_size(img_size=64, patch_size=16)
    assert model.feature_info[0]["reduction"] == 16
    after = model(nn.functional.interpolate(smooth, size=64, mode="bicubic"))
    assert torch.allclose(after, before, atol=0.1 * before.abs().max().item())
    with pytest.raises(ConfigError, match=r"img_size=\[40, 40\] is not a multiple of patch_size=16"):
        model.set_input_size(40)
    with pytest.raises(ConfigError, match="patches are square"):
        model.set_input_size(patch_size=(8, 16))
