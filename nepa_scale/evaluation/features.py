"""Features of a set of images, taken by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nepa_scale.data.batch import Batch
from nepa_scale.sharding import World
from nepa_scale.sharding.world import of_all_ranks


@dataclass(frozen=True)
class Features:
    """What a rank has of them, on the host.

    values: float16 [N, D]: half the memory, and a precision well above what tells neighbours apart
    labels, samples: int64 [N], as `Batch` has them; padding has sample -1
    """

    values: Tensor
    labels: Tensor
    samples: Tensor

    def of(self, rows: Tensor) -> Features:
        """Those of these rows."""
        return Features(self.values[rows], self.labels[rows], self.samples[rows])

    def without_padding(self) -> Features:
        return self.of(self.samples >= 0)

    def gathered(self) -> Features:
        """Those of all ranks on every rank, without padding, in the order of the set. Collective."""
        samples, labels, values = (torch.cat(of_all_ranks(one)) for one in (self.samples, self.labels, self.values))
        order, rows = samples.sort(stable=True)
        return Features(values, labels, samples).of(rows[order >= 0])


@torch.no_grad()
def collect_features(batches: Iterable[Batch], features: Callable[[Batch], Tensor], world: World) -> Features:
    """This rank's features [B, D] of all batches, padding included, so that all ranks have equally many.

    Every rank must bring equally many batches of one size (a sharded module gathers its weights in each), as
    `EvaluationStream` does.
    """
    values, labels, samples = [], [], []
    for batch in batches:
        values.append(features(batch.to_device(world.device)).to(torch.float16).cpu())
        labels.append(batch.labels)
        samples.append(batch.samples)
    return Features(torch.cat(values), torch.cat(labels), torch.cat(samples))
