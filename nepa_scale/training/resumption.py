"""Where a run begins, goes on, or goes back to: initial weights or a checkpoint, and logs that end where it does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from nepa_scale.config import ConfigError
from nepa_scale.training.checkpoint import find_checkpoint, find_checkpoint_before, load_shards, read_meta
from nepa_scale.training.loop import Position, Run
from nepa_scale.training.run_folder import forget_after, require_same_run
from nepa_scale.training.skips import SKIPPED_STEPS, TooManySkipped

REWINDS = 3  # to one and the same checkpoint, after which skipping still more of the data is no cure


def restore(job: Run) -> Position:
    """Fills the strategy from a checkpoint, or with initial weights; returns where training goes on."""
    path = find_checkpoint(job.folder, job.config.train.resume)
    if path is not None:
        return load(job, path)
    job.task.initialize(job.strategy.shards)
    job.strategy.refresh()
    if job.average is not None:
        job.average.restart()
    forget(job, -1)
    return Position()


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
