"""Attention reaches the fused causal kernel, and a prediction never sees what comes after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nepa_scale.models import CausalViT
from tests.models.test_against_reference import build, images_for


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_is_asked_for_causality_without_a_mask(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    backbone = build(qk_norm="plain")
    backbone(images_for(backbone), causal=causal)
    assert len(calls) == backbone.architecture.depth
    for args, kwargs in calls:
        assert len(args) == 3, "no mask by position"
        assert kwargs == {"is_causal": causal}
        assert {part.dtype for part in args} == {torch.float32}


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", ["none", "plain", "affine"])
def test_the_fused_kernel_runs_in_training(qk_norm: str, dtype: torch.dtype) -> None:
    backbone = build(qk_norm=qk_norm)
    backbone.dtype = dtype
    with Operators() as operators:
        _, predictions = backbone(images_for(backbone))
        predictions.float().square().sum().backward()
    flash = [name for name in operators.names if "_scaled_dot_product_flash_attention" in name]
    depth = backbone.architecture.depth
    assert sum("backward" not in name for name in flash) == depth
    assert sum("backward" in name for name in flash) == depth
    assert not any("softmax" in name for name in operators.names)


def test_queries_keys_and_values_are_one_projection() -> None:
    backbone = build()
    attention = backbone.blocks[0].attention
    assert attention.qkv.weight.shape == (96, 32)
    assert [name for name, part in attention.named_modules() if isinstance(part, nn.Linear)] == ["qkv", "out"]


def changed_tokens(backbone: CausalViT, patch: int, causal: bool) -> Tensor:
    """bool [T]: which predictions move when the pixels of one patch do."""
    images = images_for(backbone, batch=1)
    size, columns = backbone.architecture.patch_size, backbone.architecture.grid[1]
    top, left = (patch // columns) * size, (patch % columns) * size
    other = images.clone()
    other[:, :, top : top + size, left : left + size] += 1.0
    with torch.no_grad():
        before, after = (backbone(x, causal=causal)[1] for x in (images, other))
    return (before - after).abs().amax(dim=(0, 2)) > 1e-6


@pytest.mark.parametrize("patch", [0, 4, 8])
def test_a_patch_changes_no_earlier_prediction(patch: int) -> None:
    backbone = build(qk_norm="plain")
    changed = changed_tokens(backbone, patch, causal=True)
    assert changed.tolist() == [token >= patch + 1 for token in range(10)]


def test_bidirectional_attention_sees_every_patch() -> None:
    assert changed_tokens(build(qk_norm="plain"), 8, causal=False).all()


def test_no_gradient_from_a_prediction_to_later_pixels() -> None:
    backbone = build(qk_norm="affine")
    images = images_for(backbone).requires_grad_()
    backbone(images)[1][:, 4].sum().backward()  # token 4 is patch 3: the first of the second row of three
    assert images.grad is not None
    assert images.grad[:, :, 4:8, 4:].abs().max() == 0
    assert images.grad[:, :, 8:].abs().max() == 0
    assert images.grad[:, :, :4].abs().amin(dim=(0, 1)).min() > 0
    assert images.grad[:, :, 4:8, :4].abs().amin(dim=(0, 1)).min() > 0
