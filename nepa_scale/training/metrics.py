"""From the loop's tensors to the rows of metrics.jsonl, with one wait for the device a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nepa_scale.objectives import effective_rank
from nepa_scale.sharding import World, numbers_of_ranks


@dataclass(frozen=True)
class Costs:
    """What a trained image costs, from `profiling`: FLOPs (forward and backward), tokens, and the devices' peak."""

    train_flops_per_image: float
    tokens_per_image: int
    peak_flops: float | None  # of one device in the run's precision; None: not known


SPECTRA = 8  # micro-batches of an interval of which the targets' effective rank is taken: each costs a decomposition


@dataclass
class Window:
    """The steps since the last logged one. Tensors stay on the device until `Meter.row` reads them."""

    began: float
    micro_batches: list[Tensor] = field(default_factory=list)  # of the step in progress: [metrics] each
    steps: list[Tensor] = field(default_factory=list)  # [metrics] each: the means over a step's micro-batches
    names: list[str] = field(default_factory=list)  # of the metrics
    targets: list[tuple[int, Tensor]] = field(default_factory=list)  # of some micro-batches: number of its step, rows
    norms: list[Tensor] = field(default_factory=list)
    refused: list[Tensor] = field(default_factory=list)
    sound: list[Tensor] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    seen: int = 0  # micro-batches
    data_seconds: float = 0.0
    paused_seconds: float = 0.0


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
    """Collects the steps of a window and reduces them over the ranks; every method of a step is free of host syncs.

    What an objective says of itself, the loss above all, is the mean over the window's applied updates, their
    micro-batches and the ranks: all micro-batches have equally many samples. A step that was skipped counts for none.

    micro_batches: of a window, on each rank, where it is not cut short
    clock: seconds, as `time.perf_counter`
    """

    def __init__(
        self,
        world: World,
        costs: Costs,
        global_batch_size: int,
        steps_per_epoch: int,
        *,
        micro_batches: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.world, self.costs = world, costs
        self.global_batch_size, self.steps_per_epoch = global_batch_size, steps_per_epoch
        self._every = -(-micro_batches // SPECTRA)
        self._clock = clock
        self.window = Window(clock())

    def add_micro_batch(
        self,
        loss: Tensor,
        diagnostics: dict[str, Tensor],
        targets: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """One of the step in progress.

        loss, diagnostics: this rank's, [] each; the same names in every micro-batch
        targets: some of its targets, [rows, D], asked for now and then to take their effective rank
        """
        window = self.window
        values = {"loss": loss} | diagnostics
        window.names = list(values)
        window.micro_batches.append(torch.stack([value.detach().double() for value in values.values()]))
        if window.seen % self._every == 0 and (rows := targets()) is not None:
            window.targets.append((len(window.steps), rows))
        window.seen += 1

    def add_step(self, norm: Tensor, *, refused: Tensor, sound: Tensor, keys: list[str], data_seconds: float) -> None:
        """Ends the step in progress. All tensors are [] and may still be on the device.

        norm: the global gradient norm
        refused: whether all ranks left out the update
        sound: whether this rank's backward pass was finite
        keys: of this rank's samples
        """
        window = self.window
        values = torch.stack(window.micro_batches).mean(0)
        window.micro_batches = []
        window.steps.append(values)
        window.norms.append(norm)
        window.refused.append(refused)
        window.sound.append(sound & values[0].isfinite())
        window.keys.append(keys)
        window.data_seconds += data_seconds

    def pause(self, seconds: float) -> None:
        """Takes evaluation and the like out of the window's time."""
        self.window.paused_seconds += seconds

    def row(self, step: int, lr: float) -> tuple[dict[str, Any], list[BadStep]]:
        """Ends the window at `step`. Collective. Returns the metrics row and the steps that were skipped."""
        window, self.window = self.window, Window(self._clock())
        device = window.steps[0].device
        norms, refused = torch.stack(window.norms).to(device), torch.stack(window.refused).to(device)
        means = _applied_mean(torch.stack(window.steps), refused)
        # numbers of the host are filled in by the device: to copy them there would wait for it
        ranks = numbers_of_ranks(
            {
                "skipped": refused.sum(),
                "grad_norm": _applied_mean(norms.double(), refused),
                "data_seconds": torch.full((), window.data_seconds, device=device, dtype=torch.float64),
                "peak_memory_bytes": torch.full(
                    (), _peak_memory(self.world.device), device=device, dtype=torch.float64
                ),
                **dict(zip(window.names, means, strict=True)),
                **_spectra(window.targets, refused),
            }
        )
        now = self._clock()
        self.window.began = now
        peak_memory = int(max(ranks.pop("peak_memory_bytes")))
        reduced = {name: sum(numbers) / self.world.size for name, numbers in ranks.items()}
        steps = len(window.steps)
        seconds = now - window.began - window.paused_seconds
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
        first = step - len(window.steps) + 1
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


def _applied_mean(values: Tensor, refused: Tensor) -> Tensor:
    """The mean over the steps, [steps, ...] -> [...], that were not refused, bool [steps]; NaN where all were."""
    refused = refused.view(-1, *[1] * (values.dim() - 1))
    return torch.where(refused, 0.0, values).sum(0) / (~refused).sum()


def _spectra(targets: list[tuple[int, Tensor]], refused: Tensor) -> dict[str, Tensor]:
    """The mean of the targets' effective ranks over those micro-batches that have them, and whose step was applied."""
    if not targets:
        return {}
    steps, rows = zip(*targets, strict=True)
    left_out = torch.stack([refused[step] for step in steps])
    return {"effective_rank": _applied_mean(effective_rank(torch.stack(rows)).double(), left_out)}


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
