"""The attention of a model on sets of images: pages of some, and how far it looks, by layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nepa_scale.analysis.attention import CLS, AttentionSurvey, attention_rows
from nepa_scale.analysis.attention_page import draw_attention
from nepa_scale.analysis.gallery import Viewing
from nepa_scale.analysis.images import ImageSet, load_pixels
from nepa_scale.analysis.queries import centre_patch, chosen_patches, grid_of, place_of, sampled_patches
from nepa_scale.data.batch import normalize
from nepa_scale.data.listing import Item
from nepa_scale.models import CausalViT


class AttentionReport:
    """Draws and measures.

    backbone: in eval mode, on the device where it is to run
    causal: the attention to look at
    sampled: queries of each image that are measured, drawn at random
    """

    def __init__(self, backbone: CausalViT, causal: bool, viewing: Viewing, sampled: int) -> None:
        self._backbone, self._causal, self._viewing, self._sampled = backbone, causal, viewing, sampled
        self._patch = backbone.architecture.patch_size

    def draw(self) -> list[dict[str, Any]]:
        """Writes the pages and returns what they show: `file`, `image`, `set`, `grid`, `queries` (rows and columns).

        Raises:
            ConfigError: an image that cannot be used, or a query outside of it.
        """
        return [self._draw(*chosen) for chosen in self._viewing.drawn()]

    def _draw(self, one: ImageSet, item: Item, path: Path) -> dict[str, Any]:
        pixels = load_pixels(item, self._viewing.framing)
        grid = grid_of(pixels, self._patch)
        default = (centre_patch(grid), grid[0] * grid[1] - 1)
        patches = chosen_patches(self._viewing.places, default, grid, grid[0] * grid[1], item.key)
        layers = [layer.cpu() for layer in self._rows(pixels, torch.tensor(patches))]
        kind = "causal" if self._causal else "bidirectional"
        draw_attention(path, f"{item.key}: {kind} attention", pixels, grid, patches, layers, self._causal)
        queries = [list(place_of(patch, grid)) for patch in patches]
        return {"file": path.name, "image": item.key, "set": one.name, "grid": list(grid), "queries": queries}

    def measure(self) -> list[dict[str, Any]]:
        """For each set its `name`, `source`, number of `images`, and the facts of `AttentionSurvey`.

        Raises:
            ConfigError: an image that cannot be used.
        """
        return [self._measure(one) for one in self._viewing.sets]

    def _measure(self, one: ImageSet) -> dict[str, Any]:
        survey, images = AttentionSurvey(), 0
        for number, item in self._viewing.measured(one):
            pixels = load_pixels(item, self._viewing.framing)
            grid = grid_of(pixels, self._patch)
            patches = sampled_patches(self._sampled, grid[0] * grid[1], number)
            survey.add(self._rows(pixels, patches), (patches + CLS).to(self._device), grid, self._causal)
            images += 1
        return {"name": one.name, "source": one.source, "images": images, **survey.facts()}

    def _rows(self, pixels: Tensor, patches: Tensor) -> list[Tensor]:
        images = normalize(pixels[None].to(self._device), torch.zeros(1, dtype=torch.bool, device=self._device))
        return attention_rows(self._backbone, images, (patches + CLS).to(self._device), causal=self._causal)

    @property
    def _device(self) -> torch.device:
        return next(self._backbone.parameters()).device


def describe_attention(sets: list[dict[str, Any]]) -> str:
    """The measures as a table for each set: means over queries; of heads the mean, and the least and the most."""
    lines = []
    for one in sets:
        uniform = one["uniform"]
        lines += [
            f"{one['name']}: {one['images']:,} images, {one['queries']:,} queries",
            f"  {'layer':>7}  {'distance, patches':<22}{'of diagonal':>11}{'of uniform':>12}   "
            f"{'entropy, nats':<20}{'of uniform':>11}{'on CLS':>9}",
            *(_line(layer) for layer in one["layers"]),
            f"  {'uniform':>7}  {uniform['distance_patches']:<22.2f}{uniform['distance_diagonal']:>11.1%}{1:>12.2f}   "
            f"{uniform['entropy_nats']:<20.2f}{1:>11.2f}{uniform['cls_share']:>9.1%}",
        ]
    return "\n".join(lines)


def _line(layer: dict[str, Any]) -> str:
    mean = {key: sum(values) / len(values) for key, values in layer.items() if key != "layer"}

    def spread(key: str) -> str:
        return f"{mean[key]:.2f} ({min(layer[key]):.2f} to {max(layer[key]):.2f})"

    return (
        f"  {layer['layer']:>7}  {spread('distance_patches'):<22}{mean['distance_diagonal']:>11.1%}"
        f"{mean['distance_ratio']:>12.2f}   {spread('entropy_nats'):<20}{mean['entropy_ratio']:>11.2f}"
        f"{mean['cls_share']:>9.1%}"
    )
