"""A backbone that sees some patches of an image, each at its own place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nepa_scale.config import ModelConfig
from nepa_scale.models import CausalViT, resolve_architecture
from tests.models.reference import randomize
from tests.models.test_against_reference import TINY


@pytest.fixture(scope="module")
def backbone() -> CausalViT:
    built = CausalViT(resolve_architecture(ModelConfig(**TINY, qk_norm="plain")))
    randomize(built)
    return built


def images() -> Tensor:
    """[2, 3, 12, 12]: nine patches."""
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_all_patches_are_the_whole_image_in_any_order(backbone: CausalViT) -> None:
    _, whole = backbone(images(), causal=False)
    order = torch.stack([torch.arange(9), torch.tensor([8, 0, 4, 3, 2, 1, 7, 6, 5])])
    _, seen = backbone(images(), causal=False, visible=order)
    torch.testing.assert_close(seen[:, 0], whole[:, 0])
    for image in range(2):
        torch.testing.assert_close(seen[image, 1:], whole[image, 1:][order[image]])


@torch.no_grad()
def test_hidden_patches_do_not_matter_and_places_do(backbone: CausalViT) -> None:
    visible = torch.tensor([[0, 5], [7, 2]])
    embeddings, seen = backbone(images(), causal=False, visible=visible)
    assert embeddings.shape[1] == 10  # of all patches
    assert seen.shape[:2] == (2, 3)
    shown = torch.zeros(2, 9, dtype=torch.bool).scatter(1, visible, True).view(2, 1, 3, 3)
    shown = shown.repeat_interleave(4, 2).repeat_interleave(4, 3)
    _, same = backbone(torch.where(shown, images(), 7.0), causal=False, visible=visible)
    assert torch.equal(same, seen)
    # the same two patches of pixels at other places
    moved = images()
    moved[0, :, :4, 4:8] = images()[0, :, :4, :4]
    _, other = backbone(moved, causal=False, visible=torch.tensor([[1, 5], [7, 2]]))
    assert (other[0] - seen[0]).abs().max() > 1e-3
    assert torch.equal(other[1], seen[1])
