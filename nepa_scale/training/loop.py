"""The training loop: one for every task and every strategy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nepa_scale.config import Config, to_dict
from nepa_scale.data.batch import Batch
from nepa_scale.sharding import ParameterGroup, Strategy, World
from nepa_scale.training.batching import BatchPlan
from nepa_scale.training.checkpoint import Checkpointer
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.metrics import BadStep, Costs, Meter
from nepa_scale.training.optimization import learning_rate
from nepa_scale.training.progress import TerminalProgress, Tracker
from nepa_scale.training.run_folder import JsonLines


class Task(Protocol):
    """What is trained: `Pretraining` is one."""

    parameters: int

    def build(self) -> nn.Module: ...

    def initial_values(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def groups(self, names: Any) -> list[ParameterGroup]: ...

    def inputs(self, batch: Batch, step: int) -> dict[str, Any]: ...

    def diagnostics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]: ...


class TrainingFailure(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is good."""


@dataclass(frozen=True)
class Schedule:
    """The run's length and learning rate, in steps."""

    total: int
    warmup: int
    peak_lr: float
    final_lr_fraction: float
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        """The rate of update `step`, from 0."""
        return learning_rate(
            step, peak=self.peak_lr, warmup=self.warmup, total=self.total, final_fraction=self.final_lr_fraction
        )


@dataclass
class Run:
    """Everything that the loop drives, already built."""

    config: Config
    world: World
    task: Task
    strategy: Strategy
    average: MovingAverage | None
    plan: BatchPlan
    schedule: Schedule
    costs: Costs
    folder: Path
    checkpointer: Checkpointer
    trackers: list[Tracker]
    evaluate: Callable[[], dict[str, float]] | None  # collective
    dataset_samples: int


def train(run: Run, batches: Iterator[Batch], start: int) -> int:
    """Trains from step `start` (0: from the beginning) to the end of the schedule; returns the last step.

    A step's number is the count of updates up to and including it. Collective.
    Raises:
        TrainingFailure: too many steps in a row were not finite.
    """
    config, world, strategy = run.config, run.world, run.strategy
    metrics = JsonLines(run.folder / "metrics.jsonl") if world.is_main else None
    samples = JsonLines(run.folder / "samples" / f"rank_{world.rank}.jsonl") if config.train.log_samples else None
    progress = TerminalProgress(start, run.schedule.total, enabled=world.is_main)
    guard = SkipGuard(config.train.max_skipped)

    def record(row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(row)
            for tracker in run.trackers:
                tracker.log(row)

    try:
        if start == 0 and run.evaluate is not None:
            record({"step": 0} | run.evaluate())
        # here, so that the first window's rate is of training alone
        meter = Meter(world, run.costs, run.plan.global_batch_size, run.schedule.steps_per_epoch)
        for step in range(start + 1, run.schedule.total + 1):
            outputs, loss, keys, waited = _accumulate(run, batches, step)
            lr = run.schedule.lr(step - 1)
            norm = strategy.step(lr)
            if run.average is not None:
                run.average.update()
            meter.add_step(loss, norm, keys, waited)
            if samples is not None:
                samples.write({"step": step, "keys": keys})
            if step % config.train.log_every == 0 or step == run.schedule.total:
                row, bad = meter.row(step, lr, run.task.diagnostics(outputs))
                record(row)
                progress.update(row)
                guard.check(bad, run.checkpointer, progress)
            began = time.perf_counter()
            if run.evaluate is not None and _due(step, config.evaluate.every, run.schedule.total):
                found = run.evaluate()
                record({"step": step} | found)
                progress.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            if _due(step, config.checkpoint.every, run.schedule.total):
                save(run, step)
            meter.pause(time.perf_counter() - began)
        run.checkpointer.wait()
    finally:
        progress.close()
        for log in (metrics, samples):
            if log is not None:
                log.close()
    return run.schedule.total


def _accumulate(run: Run, batches: Iterator[Batch], step: int) -> tuple[dict[str, Tensor], Tensor, list[str], float]:
    """Forward and backward over a step's micro-batches: last outputs, mean loss [], sample keys, seconds waited."""
    losses, keys, waited = [], [], 0.0
    outputs: dict[str, Tensor] = {}
    for micro_step in range(run.plan.accumulation):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        inputs = run.task.inputs(batch.to_device(run.world.device), step - 1)
        outputs = run.strategy.forward_backward(inputs, micro_step)
        losses.append(outputs["loss"])
        keys += batch.keys
    return outputs, torch.stack(losses).mean(), keys, waited


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def save(run: Run, step: int) -> None:
    """Starts writing the checkpoint of `step`. Collective."""
    meta = {
        "step": step,
        "optimizer_steps": run.strategy.optimizer_steps(),
        "samples_seen": step * run.plan.global_batch_size,
        "dataset_samples": run.dataset_samples,
        "strategy": run.strategy.name,
        "world_size": run.world.size,
        "config": to_dict(run.config),
    }
    run.checkpointer.save(step, run.strategy.shards, replicated=run.strategy.replicated, meta=meta)


class SkipGuard:
    """Reports the steps that were skipped and stops a run that skips too many in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._last, self._in_a_row = -1, 0

    def check(self, bad: list[BadStep], checkpointer: Checkpointer, progress: TerminalProgress) -> None:
        """Raises TrainingFailure at the limit, on every rank alike."""
        for step in bad:
            self._in_a_row = self._in_a_row + 1 if step.step == self._last + 1 else 1
            self._last = step.step
            where = (
                f"rank {', '.join(map(str, step.ranks))}" if step.ranks else "the gradient, though every loss is finite"
            )
            names = f"; samples {' '.join(step.keys[:8])}{' ...' if len(step.keys) > 8 else ''}" if step.keys else ""
            progress.say(f"step {step.step} was skipped: not finite on {where}{names}")
            if self._in_a_row >= self.limit:
                good = checkpointer.latest()
                raise TrainingFailure(
                    f"{self._in_a_row} steps in a row up to step {step.step} were not finite (on {where}{names}); "
                    f"the last good checkpoint is {good or 'none'}. Lower optimizer.base_lr or look at the samples"
                )
