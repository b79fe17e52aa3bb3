"""How much of the next patch a model's predictions tell, against a target that is the same for all models.

NEPA's own loss compares predictions with embeddings that the model trains along with them: a lower one may mean better
predictions or easier targets, and two models' losses have no common scale. Here the target is frozen: the pixels of the
next patch, their mean over the set taken away. A ridge regression from predictions to it is fitted on training images,
and the mean cosine of its output with the target on validation images is reported: 0 is what a constant reaches, 1
perfect.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.models.layers import pixels_of_patches

RIDGE = 1e-3  # of the mean variance of the predictions


class ReferencePrediction:
    """Accumulates what the regression needs, [D + 1, D + 1 + pixels] numbers, however many images there are."""

    def __init__(self) -> None:
        self._products: Tensor | None = None
        self._weight: Tensor | None = None
        self._mean: Tensor | None = None
        self._cosines = torch.zeros(2, dtype=torch.float64)

    def fit_on(self, predictions: Tensor, images: Tensor, counted: Tensor) -> None:
        """Adds a batch: predictions [B, T, D], normalised images [B, 3, h, w], bool [B]: which are not padding."""
        x, y = self._pairs(predictions, images, counted)
        found = (x.T @ torch.cat([x, y], dim=1)).double().cpu()
        self._products = found if self._products is None else self._products + found

    def solve(self) -> None:
        """Ends the fitting. Collective."""
        assert self._products is not None
        dist.all_reduce(self._products)
        width = len(self._products)
        count = self._products[-1, width - 1]  # the last column of x is 1
        gram, cross = self._products[:, :width] / count, self._products[:, width:] / count
        ridge = RIDGE * gram.diagonal()[:-1].mean() * torch.eye(width, dtype=gram.dtype)
        ridge[-1, -1] = 0
        self._mean = cross[-1].clone()
        cross[:, :] -= gram[:, -1:] * self._mean  # regression of the centred target
        self._weight = torch.linalg.solve(gram + ridge, cross)

    def evaluate_on(self, predictions: Tensor, images: Tensor, counted: Tensor) -> None:
        """Adds a batch of validation images."""
        assert self._weight is not None
        assert self._mean is not None
        x, y = self._pairs(predictions, images, counted)
        cosine = F.cosine_similarity(x @ self._weight.to(x), y - self._mean.to(y), dim=1)
        self._cosines += torch.tensor([cosine.double().sum().item(), len(cosine)], dtype=torch.float64)

    def cosine(self) -> float:
        """The mean over the validation images' patches. Collective."""
        dist.all_reduce(self._cosines)
        return float(self._cosines[0] / self._cosines[1])

    def _pairs(self, predictions: Tensor, images: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of CLS and all patches but the last, with 1 appended, and the pixels of the patches: rows."""
        side = round((images.shape[2] * images.shape[3] / (predictions.shape[1] - 1)) ** 0.5)
        x = predictions[counted, :-1].float()
        return F.pad(x, (0, 1), value=1.0).flatten(0, 1), pixels_of_patches(images[counted], side).flatten(0, 1)
