"""The training loop: one for every task and every strategy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from nepa_scale.config import Config, to_dict
from nepa_scale.data.batch import Batch
from nepa_scale.models import Architecture
from nepa_scale.sharding import ParameterGroup, Shard, Strategy, World
from nepa_scale.training.agreement import Agreement, Stopped, StopRequest
from nepa_scale.training.backward_probe import BackwardProbe
from nepa_scale.training.batching import BatchPlan
from nepa_scale.training.checkpoint import Checkpointer
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.garbage import collect_garbage, garbage_on_request
from nepa_scale.training.metrics import Costs, Meter
from nepa_scale.training.progress import TerminalProgress
from nepa_scale.training.run_folder import JsonLines
from nepa_scale.training.schedule import Schedule
from nepa_scale.training.skips import SKIPPED_STEPS, SkipLog
from nepa_scale.training.teacher import Teacher
from nepa_scale.training.tracking import Tracker
from nepa_scale.training.update_guard import UpdateGuard
from nepa_scale.training.watchdog import Watchdog
from nepa_scale.training.weights import SHARE


class Task(Protocol):
    """What is trained: `Pretraining` is one."""

    architecture: Architecture
    parameters: int
    quality: str  # the metric of the evaluation by which the best checkpoint is known

    def build(self) -> nn.Module: ...

    def initialize(self, shards: list[Shard]) -> None: ...

    def groups(self, names: Any) -> list[ParameterGroup]: ...

    def inputs(self, batch: Batch, step: int) -> dict[str, Any]: ...

    def diagnostics(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def targets(self, outputs: dict[str, Tensor]) -> Tensor | None: ...


@dataclass(frozen=True)
class Position:
    """Where in a run training goes on.

    step: updates made or skipped so far
    passed_over: global batches that were left out beside them, by rewinds
    evaluate: whether the evaluation of this step is still to be made
    """

    step: int = 0
    passed_over: int = 0
    evaluate: bool = True


@dataclass
class Run:
    """Everything that the loop drives, already built."""

    config: Config
    world: World
    task: Task
    strategy: Strategy
    average: MovingAverage | None
    teacher: Teacher | None
    guard: UpdateGuard
    probe: BackwardProbe
    plan: BatchPlan
    schedule: Schedule
    costs: Costs
    folder: Path
    checkpointer: Checkpointer
    watchdog: Watchdog
    agreement: Agreement
    trackers: list[Tracker]
    evaluate: Callable[[], dict[str, Any]] | None  # collective; raises Stopped; names the weights that it was of
    dataset_samples: int
    class_names: list[str] | None = None  # of the labels, where a classifier is trained and they are known
    start_number: int = 0  # of this start in RUN/starts.jsonl; on the main rank only


def train(run: Run, batches: Iterator[Batch], start: Position) -> StopRequest | None:
    """Trains from `start` to the end of the schedule. Collective.

    A step's number is the count of updates, made or skipped, up to and including it. Returns None at the end; or what
    asked for a stop, after which everything has been saved.
    Raises:
        TooManySkipped: in a row.
    """
    config, strategy, watchdog, total = run.config, run.strategy, run.watchdog, run.schedule.total
    logs = Logs(run, start.step)
    stop: StopRequest | None = None
    with contextlib.closing(logs), garbage_on_request():
        if start.evaluate:
            stop = evaluate(run, logs, start.step)
            if stop is None and start.step > 0:
                save(run, replace(start, evaluate=False))
        # here, so that the first window's rate is of training alone
        meter = Meter(
            run.world,
            run.costs,
            run.plan.global_batch_size,
            run.schedule.steps_per_epoch,
            micro_batches=config.train.log_every * run.plan.accumulation,
        )
        step = start.step
        for step in range(start.step + 1, total + 1) if stop is None else ():
            run.agreement.begin()
            keys, waited = _accumulate(run, meter, batches, step, patient=step == start.step + 1)
            watchdog.at(step, "updating", patient=step == start.step + 1)
            rates = run.schedule.rates(step - 1, strategy.groups)
            norm = strategy.step(rates, run.guard, run.schedule.weight_decays(step - 1, strategy.groups))
            if run.average is not None:
                run.average.update(run.guard.refused, run.schedule.average_decay(step - 1))
            sound = run.probe.take()
            meter.add_step(norm, refused=run.guard.refused, sound=sound, keys=keys, data_seconds=waited)
            logs.add_samples(step, keys)
            watchdog.at(step, "after the update")
            stop = run.agreement.finish()
            if step % config.train.log_every == 0 or step == total or stop is not None:
                row, bad = meter.row(step, max(rates))
                logs.add_row(row)
                logs.skips.check(bad, step, run.checkpointer, logs.progress)
                collect_garbage()
            began = time.perf_counter()
            evaluation_due = run.evaluate is not None and _due(step, config.evaluate.every, total)
            if evaluation_due and stop is None:
                stop = evaluate(run, logs, step)
                evaluation_due = stop is not None
            if stop is not None or _due(step, config.checkpoint.every, total):
                save(run, Position(step, start.passed_over, evaluation_due))
                mark_best(run, logs, step)
            meter.pause(time.perf_counter() - began)
            if stop is not None:
                break
        with watchdog.patient(step, "saving"):
            run.checkpointer.wait()
    return stop


def _accumulate(
    run: Run, meter: Meter, batches: Iterator[Batch], step: int, *, patient: bool
) -> tuple[list[str], float]:
    """Forward and backward over a step's micro-batches, which the meter is told: sample keys, seconds waited for data.

    patient: the step may compile, and is given more time
    """
    keys, waited = [], 0.0
    for micro_step in range(run.plan.accumulation):
        run.watchdog.at(step, "waiting for data", patient=patient)
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        run.watchdog.at(step, "computing", patient=patient)
        inputs = run.task.inputs(batch.to_device(run.world.device), step - 1)
        if run.teacher is not None:
            inputs = run.teacher.teach(inputs)
        outputs = run.strategy.forward_backward(inputs, micro_step)
        meter.add_micro_batch(outputs["loss"], run.task.diagnostics(outputs), partial(run.task.targets, outputs))
        keys += batch.keys
    return keys, waited


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def evaluate(run: Run, logs: Logs, step: int) -> StopRequest | None:
    """Evaluates, where the run does, and records what it finds; returns what asked for a stop meanwhile. Collective."""
    if run.evaluate is None:
        return None
    began = time.monotonic()
    try:
        with run.watchdog.patient(step, "evaluating"):
            found = run.evaluate()
    except Stopped as stopped:
        return stopped.request
    logs.add_evaluation(step, found, time.monotonic() - began)
    return None


def save(run: Run, position: Position) -> None:
    """Starts writing the checkpoint of `position`. Collective."""
    meta = {
        "step": position.step,
        "passed_over": position.passed_over,
        "evaluate": position.evaluate,
        "optimizer_steps": run.strategy.optimizer_steps(),
        "samples_seen": position.step * run.plan.global_batch_size,
        "recent_norms": run.guard.state(),
        SHARE: run.average.initial_share() if run.average is not None else None,
        "dataset_samples": run.dataset_samples,
        "strategy": run.strategy.name,
        "world_size": run.world.size,
        "config": to_dict(run.config),
        "class_names": run.class_names,
        "start": run.start_number,
    }
    with run.watchdog.patient(position.step, "saving"):
        run.checkpointer.save(position.step, run.strategy.shards, replicated=run.strategy.replicated, meta=meta)


def mark_best(run: Run, logs: Logs, step: int) -> None:
    """Has the checkpoint of `step`, just saved, kept if the evaluation of the same step was the best so far."""
    metric = run.config.checkpoint.best
    if metric == "auto":
        metric = run.task.quality
    if metric is None or logs.evaluated[0] != step or metric not in logs.evaluated[1]:
        return
    found = logs.evaluated[1]
    run.checkpointer.mark_best(step, metric, found[metric], weights=found["weights"], if_better=True)


def describe_evaluation(step: int, found: dict[str, Any]) -> str:
    """An evaluation in a line: of which weights, and why not of the average where there is one."""
    share, weights = found.get(SHARE), found["weights"]
    young = f"; the moving average is {share:.0%} initial weights" if share is not None and weights == "raw" else ""
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name not in ("weights", SHARE))
    return f"step {step} ({weights} weights{young}): {numbers}"


class Logs:
    """What a run writes for people and plots; files by the main rank, except each rank's own samples."""

    def __init__(self, run: Run, start: int) -> None:
        main = run.world.is_main
        self._metrics = JsonLines(run.folder / "metrics.jsonl") if main else None
        self._skipped = JsonLines(run.folder / SKIPPED_STEPS) if main else None
        path = run.folder / "samples" / f"rank_{run.world.rank}.jsonl"
        self._samples = JsonLines(path) if run.config.train.log_samples else None
        self._trackers = run.trackers
        self.progress = TerminalProgress(start, run.schedule.total, enabled=main)
        self.skips = SkipLog(run.config.train.max_skipped, self._skipped)
        self.evaluated: tuple[int, dict[str, Any]] = (-1, {})  # the last evaluation: its step, what it found

    def add_row(self, row: dict[str, Any]) -> None:
        self._record(row)
        self.progress.update(row)

    def add_evaluation(self, step: int, found: dict[str, Any], seconds: float) -> None:
        self.evaluated = (step, found)
        self._record({"step": step} | found | {"evaluation_seconds": seconds})
        if step > 0:
            self.progress.say(describe_evaluation(step, found))

    def add_samples(self, step: int, keys: list[str]) -> None:
        if self._samples is not None:
            self._samples.write({"step": step, "keys": keys})

    def close(self) -> None:
        self.progress.close()
        for log in (self._metrics, self._skipped, self._samples):
            if log is not None:
                log.close()

    def _record(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row)
            for tracker in self._trackers:
                tracker.log(row)
