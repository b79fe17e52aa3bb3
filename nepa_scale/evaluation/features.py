"""Features of a set of images, taken by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_scale.data.batch import Batch
from nepa_scale.sharding import World


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

    def gathered(self, world: World) -> Features:
        """Those of all ranks on every rank, without padding, in the order of the set. Collective."""
        samples = _gather(self.samples, world)
        order, rows = samples.sort(stable=True)
        rows = rows[order >= 0]
        return Features(_gather(self.values, world)[rows], _gather(self.labels, world)[rows], samples[rows])


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


def _gather(part: Tensor, world: World) -> Tensor:
    """The ranks' parts [n, ...] after one another, [ranks * n, ...]."""
    whole = part.new_empty(world.size, *part.shape)
    dist.all_gather(list(whole.unbind()), part.contiguous())
    return whole.flatten(0, 1)
