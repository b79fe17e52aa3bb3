"""What a model predicts on sets of images: pages of some, and how often it finds the next patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nepa_scale.analysis.gallery import Viewing
from nepa_scale.analysis.images import ImageSet, load_pixels
from nepa_scale.analysis.queries import Grid, centre_patch, chosen_patches, grid_of, place_of
from nepa_scale.analysis.retrieval import NextPatchRetrieval, cosines, ranks
from nepa_scale.analysis.similarity_page import Query, SimilarityMap, draw_similarity
from nepa_scale.config import ConfigError
from nepa_scale.data.batch import normalize
from nepa_scale.data.listing import Item
from nepa_scale.objectives import NextEmbedding

_CANDIDATES = {"all": "all patches", "unseen": "unseen patches"}


class SimilarityReport:
    """Draws and measures.

    task: in eval mode, on the device where it is to run
    """

    def __init__(self, task: NextEmbedding, viewing: Viewing) -> None:
        self._task, self._viewing = task, viewing
        self._patch = task.backbone.architecture.patch_size

    def draw(self) -> list[dict[str, Any]]:
        """Writes the pages and returns what they show: `file`, `image`, `set`, `grid`, and for each of `queries` its
        `place` (row and column), and the `cosine` and `rank` of the next patch for prediction and copy.

        Raises:
            ConfigError: an image that cannot be used, or a query outside of it or without a next patch.
        """
        return [self._draw(*chosen) for chosen in self._viewing.drawn()]

    def _draw(self, one: ImageSet, item: Item, path: Path) -> dict[str, Any]:
        pixels, grid, embeddings, predictions = self._outputs(item)
        count = grid[0] * grid[1]
        patches = chosen_patches(self._viewing.places, (centre_patch(grid), count - 2), grid, count - 1, item.key)
        queries = [
            Query(
                patch,
                *(_map_of(tokens[patch + 1], embeddings[1:], patch, grid) for tokens in (predictions, embeddings)),
            )
            for patch in patches
        ]
        draw_similarity(path, f"{item.key}: cosine with the embedding of each patch", pixels, grid, queries)
        shown = [_facts(query, grid) for query in queries]
        return {"file": path.name, "image": item.key, "set": one.name, "grid": list(grid), "queries": shown}

    def measure(self) -> list[dict[str, Any]]:
        """For each set its `name`, `source`, number of `images`, and the facts of `NextPatchRetrieval`.

        Raises:
            ConfigError: an image that cannot be used.
        """
        return [self._measure(one) for one in self._viewing.sets]

    def _measure(self, one: ImageSet) -> dict[str, Any]:
        retrieval, images = NextPatchRetrieval(), 0
        for _, item in self._viewing.measured(one):
            _, _, embeddings, predictions = self._outputs(item)
            retrieval.add(embeddings, predictions)
            images += 1
        return {"name": one.name, "source": one.source, "images": images, **retrieval.facts()}

    @torch.no_grad()
    def _outputs(self, item: Item) -> tuple[Tensor, Grid, Tensor, Tensor]:
        """Pixels, grid, embeddings and predictions [T, D] of an image."""
        pixels = load_pixels(item, self._viewing.framing)
        grid = grid_of(pixels, self._patch)
        if grid == (1, 1):
            raise ConfigError(f"{item.key} is a single patch of {self._patch} pixels: choose a larger --image-size")
        device = next(self._task.parameters()).device
        out = self._task(normalize(pixels[None].to(device), torch.zeros(1, dtype=torch.bool, device=device)))
        return pixels, grid, out["embeddings"][0], out["predictions"][0]


def _map_of(vector: Tensor, patches: Tensor, patch: int, grid: Grid) -> SimilarityMap:
    found = cosines(vector[None], patches).cpu()
    return SimilarityMap(found.view(grid).numpy(), float(ranks(found, torch.tensor([patch + 1]))))


def _facts(query: Query, grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {"place": list(place_of(query.patch, grid))}
    for name, one in (("model", query.prediction), ("copy", query.own)):
        found[name] = {"cosine": float(one.cosines.flat[query.patch + 1]), "rank": one.rank}
    return found


def describe_similarity(sets: list[dict[str, Any]]) -> str:
    """The scores as a table, a line for each set, candidates and predictor."""
    width = max(len("set"), *(len(one["name"]) for one in sets))
    lines = [
        f"{'set':<{width}}  {'among':<15} {'prediction':<10}{'top-1':>8}{'top-5':>8}{'median rank':>13}"
        f"{'mean 1/rank':>13}{'cosine':>9}"
    ]
    for one in sets:
        for among, title in _CANDIDATES.items():
            for name, score in one[among].items():
                cosine = f"{one['cosine'][name]:.3f}" if name in one["cosine"] else "-"
                lines.append(
                    f"{one['name']:<{width}}  {title:<15} {name:<10}{score['top1']:>8.1%}{score['top5']:>8.1%}"
                    f"{score['median_rank']:>13g}{score['mean_reciprocal_rank']:>13.3f}{cosine:>9}"
                )
    counts = (f"{one['name']} {one['images']:,} images, {one['predictions']:,} predictions" for one in sets)
    return "\n".join([*lines, *counts])
