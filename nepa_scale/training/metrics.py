"""From the loop's tensors to the rows of metrics.jsonl, with one wait for the device a row."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_scale.sharding import World, numbers_of_ranks


@dataclass(frozen=True)
class Costs:
    """What a trained image costs, from `profiling`: FLOPs (forward and backward), tokens, and the devices' peak."""

    train_flops_per_image: float
    tokens_per_image: int
    peak_flops: float | None  # of one device in the run's precision; None: not known


@dataclass
class Window:
    """The steps since the last logged one. Tensors stay on the device until `Meter.row` reads them."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    refused: list[Tensor] = field(default_factory=list)
    sound: list[Tensor] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    data_seconds: float = 0.0
    paused_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class BadStep:
    """A step that no rank applied.

    why: "not finite on rank 1", for instance
    ranks: whose loss or backward pass was not finite; all, where none's shows it, or where the norm was a spike
    keys: of those ranks' samples
    """

    step: int
    why: str
    ranks: list[int]
    keys: list[str]


class Meter:
    """Collects the steps of a window and reduces them over the ranks; every method of a step is free of host syncs."""

    def __init__(self, world: World, costs: Costs, global_batch_size: int, steps_per_epoch: int) -> None:
        self.world, self.costs = world, costs
        self.global_batch_size, self.steps_per_epoch = global_batch_size, steps_per_epoch
        self.window = Window()

    def add_step(
        self, loss: Tensor, norm: Tensor, *, refused: Tensor, sound: Tensor, keys: list[str], data_seconds: float
    ) -> None:
        """All tensors are [] and may still be on the device.

        loss: this rank's mean over its micro-batches
        norm: the global gradient norm
        refused: whether all ranks left out the update
        sound: whether this rank's loss and backward pass were finite
        keys: of this rank's samples
        """
        self.window.losses.append(loss)
        self.window.norms.append(norm)
        self.window.refused.append(refused)
        self.window.sound.append(sound)
        self.window.keys.append(keys)
        self.window.data_seconds += data_seconds

    def pause(self, seconds: float) -> None:
        """Takes evaluation and the like out of the window's time."""
        self.window.paused_seconds += seconds

    def row(self, step: int, lr: float, diagnostics: dict[str, Tensor]) -> tuple[dict[str, Any], list[BadStep]]:
        """Ends the window at `step`. Collective. Returns the metrics row and the steps that were skipped."""
        window, self.window = self.window, Window()
        device = window.losses[0].device
        losses, norms = torch.stack(window.losses), torch.stack(window.norms).to(device)
        refused = torch.stack(window.refused).to(device)
        # numbers of the host are filled in by the device: to copy them there would wait for it
        ranks = numbers_of_ranks(
            {
                "loss": torch.where(refused, 0.0, losses).sum() / (~refused).sum(),
                "skipped": refused.sum(),
                "grad_norm": norms[-1],
                "data_seconds": torch.full((), window.data_seconds, device=device),
                "peak_memory_bytes": torch.full(
                    (), _peak_memory(self.world.device), device=device, dtype=torch.float64
                ),
                **diagnostics,
            }
        )
        peak_memory = int(max(ranks.pop("peak_memory_bytes")))
        reduced = {name: sum(numbers) / self.world.size for name, numbers in ranks.items()}
        steps = len(window.losses)
        seconds = time.perf_counter() - window.began - window.paused_seconds
        rate = steps * self.global_batch_size / seconds
        skipped = int(reduced.pop("skipped"))
        bad = self._name_bad_steps(step, window, norms, refused) if skipped else []
        seen = step * self.global_batch_size
        peak = self.costs.peak_flops
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "samples_seen": seen,
            "tokens_seen": seen * self.costs.tokens_per_image,
            "flops_seen": seen * self.costs.train_flops_per_image,
            "loss": _finite(reduced.pop("loss")),  # null where all steps of the window were skipped
            "grad_norm": _finite(reduced.pop("grad_norm")),
            "lr": lr,
            "skipped_steps": skipped,
            "images_per_second": rate,
            "tokens_per_second": rate * self.costs.tokens_per_image,
            "step_seconds": seconds / steps,
            "data_seconds": reduced.pop("data_seconds") / steps,
            "mfu": rate * self.costs.train_flops_per_image / (peak * self.world.size) if peak else None,
            "peak_memory_bytes": peak_memory,
        }
        return row | {name: _finite(value) for name, value in reduced.items()}, bad

    def _name_bad_steps(self, step: int, window: Window, norms: Tensor, refused: Tensor) -> list[BadStep]:
        """Which ranks' samples made the refused steps of the window bad."""
        first = step - len(window.losses) + 1
        sound = torch.stack(window.sound).tolist()
        own = {i: (sound[i], window.keys[i]) for i, skipped in enumerate(refused.tolist()) if skipped}
        gathered: list[dict[int, tuple[bool, list[str]]]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(gathered, own)
        steps = []
        for i in own:
            norm = float(norms[i])
            unsound = [rank for rank, found in enumerate(gathered) if not found[i][0]]
            ranks = unsound or list(range(self.world.size))
            if math.isfinite(norm):
                why = f"a spike: the gradient norm was {norm:.4g}"
            elif unsound:
                why = f"not finite on rank {', '.join(map(str, unsound))}"
            else:
                why = "the gradient was not finite, though every rank's loss was"
            steps.append(BadStep(first + i, why, ranks, [key for rank in ranks for key in gathered[rank][i][1]]))
        return steps


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
