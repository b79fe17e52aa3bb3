"""Does a model predict *which* patch comes next? The true next patch's rank among the patches of its image.

The loss of next-embedding prediction cannot tell: where all embeddings of an image are alike, any of them is a good
prediction. Here a prediction has to be nearer, by the cosine of the objective, to the embedding of the next patch than
to the others.

Shapes: N patches of an image, T = 1 + N tokens (CLS first), D width, Q queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 1e-6  # cosines closer than this are equal: those of equal patches differ by rounding
TOP = (1, 5)


def cosines(vectors: Tensor, embeddings: Tensor) -> Tensor:
    """The cosine of each of `vectors` [Q, D] with each of `embeddings` [N, D], float32 [Q, N]."""
    return F.normalize(vectors.float(), dim=-1) @ F.normalize(embeddings.float(), dim=-1).T


def ranks(similarities: Tensor, truth: Tensor, candidates: Tensor | None = None) -> Tensor:
    """The rank of the true patch by falling similarity, from 1, float32 [Q]; equal ones share the mean of their ranks,
    so that a constant prediction gains nothing.

    similarities: [Q, N]
    truth: int64 [Q], the true patches
    candidates: bool [Q, N], which patches compete (the true one among them); None: all
    """
    true = similarities.gather(1, truth[:, None])
    nearer, level = similarities > true + TIE, (similarities - true).abs() <= TIE
    if candidates is not None:
        nearer, level = nearer & candidates, level & candidates
    return nearer.sum(1) + (level.sum(1) + 1) / 2


class RankCounts:
    """A histogram of ranks: however many there are, it takes the memory of the largest image's patches."""

    def __init__(self) -> None:
        self._halves = torch.zeros(0, dtype=torch.float64)  # how often the rank n/2 was seen

    def add(self, found: Tensor) -> None:
        """Adds ranks [Q], whole or half numbers from 1."""
        self._add(torch.bincount((2 * found).long().cpu()).double())

    def add_chance(self, candidates: Tensor) -> None:
        """Adds what a random order gives: for each of the numbers of candidates n, int64 [Q], 1/n at every rank."""
        of_size = torch.bincount(candidates.cpu()).double()  # index n
        sizes = torch.arange(len(of_size)).clamp_min(1)
        at_least = (of_size / sizes).flip(0).cumsum(0).flip(0)  # at rank r: the sum of 1/n over all n >= r
        at_least[0] = 0
        halves = torch.zeros(2 * len(at_least) - 1, dtype=torch.float64)
        halves[::2] = at_least
        self._add(halves)

    def _add(self, halves: Tensor) -> None:
        longest = max(len(halves), len(self._halves))
        self._halves = F.pad(self._halves, (0, longest - len(self._halves))) + F.pad(halves, (0, longest - len(halves)))

    def scores(self) -> dict[str, float]:
        """`top1` and `top5`, 0..1; `median_rank`; `mean_reciprocal_rank`."""
        total, seen = self._halves.sum(), self._halves.cumsum(0)
        each = torch.arange(1, len(self._halves), dtype=torch.float64) / 2
        median = int((seen >= total / 2 - 1e-9).nonzero()[0]) / 2
        return {
            **{f"top{top}": float(self._halves[: 2 * top + 1].sum() / total) for top in TOP},
            "median_rank": median,
            "mean_reciprocal_rank": float((self._halves[1:] / each).sum() / total),
        }


class NextPatchRetrieval:
    """Ranks of the next patch for the model's prediction, for two that need no model, and for chance.

    model: the prediction at patch t
    copy: the embedding of patch t itself
    mean: the mean of the embeddings of patches 0 to t

    among `all` patches of the image, and among the `unseen` ones, t+1 on. Among all, `copy` is never first, being
    nearest to itself; only among the unseen is it a fair rival. Every patch with a next one counts, and CLS does not:
    before patch 0 there is nothing to copy.
    """

    PREDICTORS = ("model", "copy", "mean")
    CANDIDATES = ("all", "unseen")

    def __init__(self) -> None:
        self.predictions = 0
        self._counts = {
            (among, name): RankCounts() for among in self.CANDIDATES for name in (*self.PREDICTORS, "chance")
        }
        self._cosines = dict.fromkeys(self.PREDICTORS, 0.0)

    def add(self, embeddings: Tensor, predictions: Tensor) -> None:
        """Adds an image of at least two patches: what the backbone gives for it, [T, D] each."""
        patches = embeddings[1:].float()
        count = len(patches)
        numbers = torch.arange(count, device=patches.device)
        truth, unseen = numbers[1:], numbers > numbers[:-1, None]
        guesses = {
            "model": predictions[1:-1],
            "copy": patches[:-1],
            "mean": (patches.cumsum(0) / (numbers[:, None] + 1))[:-1],
        }
        for name, guess in guesses.items():
            similarities = cosines(guess, patches)
            self._cosines[name] += float(similarities.gather(1, truth[:, None]).double().sum())
            self._counts["all", name].add(ranks(similarities, truth))
            self._counts["unseen", name].add(ranks(similarities, truth, unseen))
        self._counts["all", "chance"].add_chance(torch.full((count - 1,), count))
        self._counts["unseen", "chance"].add_chance(unseen.sum(1))
        self.predictions += count - 1

    def facts(self) -> dict[str, Any]:
        """`predictions`: how many; `cosine` with the next patch's embedding by predictor; the scores of `RankCounts` by
        candidates and predictor (`chance` too)."""
        found: dict[str, Any] = {
            "predictions": self.predictions,
            "cosine": {name: total / self.predictions for name, total in self._cosines.items()},
        }
        for among in self.CANDIDATES:
            found[among] = {name: self._counts[among, name].scores() for name in (*self.PREDICTORS, "chance")}
        return found
