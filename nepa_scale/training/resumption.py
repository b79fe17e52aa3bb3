"""Where a run begins, goes on, or goes back to: initial weights or a checkpoint, and logs that end where it does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from nepa_scale.config import Config, ConfigError, config_from_dict
from nepa_scale.training.checkpoint import (
    find_checkpoint,
    find_checkpoint_before,
    load_shards,
    locate_checkpoint,
    read_meta,
)
from nepa_scale.training.loop import Position, Run
from nepa_scale.training.run_folder import forget_after, require_same_run
from nepa_scale.training.run_record import RunRecord, append_start, changes_between
from nepa_scale.training.skips import SKIPPED_STEPS, TooManySkipped
from nepa_scale.training.weights import initial_share

REWINDS = 3  # to one and the same checkpoint, after which skipping still more of the data is no cure


def refuse_finished(folder: Path, config: Config, strategy: str | None, total: int) -> None:
    """Of a run with nothing left to train, other settings would only be said, and never used; the main rank only.

    strategy: resolved; None where the command names none, and takes what the number of processes suggests: the ranks
        that happen to be there are no setting, so that a finished run can be looked at from anywhere
    total: steps of the run as it is asked for now
    Raises:
        ConfigError: the newest checkpoint is at `total` or past it, and was trained with other settings. All are named.
    """
    try:
        meta = read_meta(locate_checkpoint(folder if config.train.resume == "auto" else config.train.resume))
        trained = config_from_dict(meta["config"], str(folder))
    except ConfigError:  # there is none, or not one that can be read: `restore` says so
        return
    changed = changes_between(trained, config, (meta.get("strategy"), strategy))
    if meta["step"] < total or not changed or any(change.identity for change in changed):
        return  # another run's is refused by `require_same_run`
    raise ConfigError(
        f"{folder} has finished (step {meta['step']}, of {total} asked for), and was trained with other settings: "
        f"{', '.join(map(str, changed))}; choose another folder with output=..., or go on with more "
        f"{'train.steps' if config.train.steps else 'train.epochs'}"
    )


def restore(job: Run) -> Position:
    """Fills the strategy from a checkpoint, or with initial weights; returns where training goes on.

    The start is recorded, and every setting that changes with it printed.
    """
    path = find_checkpoint(job.folder, job.config.train.resume)
    position = begin(job) if path is None else load(job, path)
    if job.world.is_main:
        job.start_number = _record(job, path)
    return position


def begin(job: Run) -> Position:
    """Fills the strategy with initial weights."""
    job.task.initialize(job.strategy.shards)
    job.strategy.refresh()
    if job.average is not None:
        job.average.restart()
    forget(job, -1)
    return Position()


def _record(job: Run, path: Path | None) -> int:
    """Adds this start to the run's record; returns its number."""
    record = RunRecord.read(job.folder)
    meta = read_meta(path) if path is not None else {}
    before = config_from_dict(meta["config"], str(path)) if path is not None else record.config
    step = meta.get("step", 0)
    changed = changes_between(before, job.config, (meta.get("strategy"), job.strategy.name), step)
    if step < job.schedule.total:
        for change in changed:
            print(f"changed{f' after step {step}' if step else ''}: {change}", flush=True)
        if step and any(change.key in ("train.steps", "train.epochs") for change in changed):
            print(f"  steps 1 to {step} followed the schedule of the old length: the run is not one schedule")
    own = path is not None and path.resolve().parent.parent == job.folder.resolve()
    return append_start(
        job.folder,
        job.config,
        strategy=job.strategy.name,
        step=step,
        after=meta.get("start") if own else None,
        checkpoint=path,
        changed=changed,
    )


def load(job: Run, path: Path) -> Position:
    """Fills the strategy from a checkpoint of this run; returns where training goes on from there."""
    meta = read_meta(path)
    require_same_run(meta["config"], job.config, str(path))
    if meta["dataset_samples"] != job.dataset_samples:
        raise ConfigError(
            f"{path} was trained on {meta['dataset_samples']} samples, data.train={job.config.data.train} holds "
            f"{job.dataset_samples}: resuming needs the same data"
        )
    load_shards(path, job.strategy.shards)
    job.strategy.set_optimizer_steps(meta["optimizer_steps"])
    job.strategy.refresh()
    job.guard.load(meta.get("recent_norms", []))
    if job.average is not None:
        averaged = config_from_dict(meta["config"], str(path)).ema.decay > 0  # else it starts from the weights, now
        job.average.set_initial_share(initial_share(meta) if averaged else 1.0)
    forget(job, meta["step"])
    return Position(meta["step"], meta.get("passed_over", 0), meta.get("evaluate", False))


def forget(job: Run, step: int) -> None:
    """Removes from the run's logs and their mirrors what comes after `step`: it is written anew. Collective."""
    if job.world.is_main:
        for path in (job.folder / "metrics.jsonl", job.folder / SKIPPED_STEPS):
            forget_after(path, step)
        for samples in (job.folder / "samples").glob("rank_*.jsonl"):
            forget_after(samples, step)
        for tracker in job.trackers:
            tracker.go_on_from(step)
    dist.barrier()  # before any rank appends to them


def rewind(job: Run, failure: TooManySkipped, position: Position, rewinds: Counter[int]) -> Position:
    """Back to the checkpoint before the skipped steps; the data up to the present step will not be seen again.

    rewinds: how often the run went back to which step
    Raises:
        TooManySkipped: `failure`, where there is nothing to go back to, or going back has not helped.
    """
    job.checkpointer.wait()
    path = find_checkpoint_before(job.folder, failure.first) if job.config.train.on_bad_steps == "rewind" else None
    if path is None:
        raise failure
    step = read_meta(path)["step"]
    rewinds[step] += 1
    if rewinds[step] > REWINDS:
        raise failure
    job.checkpointer.go_back(step)
    passed_over = failure.step + position.passed_over - step
    if job.world.is_main:
        print(
            f"going back to step {step}: steps {failure.first} to {failure.step} were bad; "
            f"{failure.step - step} batches are passed over"
        )
    return dataclasses.replace(load(job, path), passed_over=passed_over)
