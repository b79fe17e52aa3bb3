"""Pretrains a causal ViT by next-embedding prediction: the one entry point, for every strategy and launcher.

    python nepa_scale/train.py --config configs/pretrain/demo.yaml
    torchrun --nproc_per_node 8 nepa_scale/train.py --config configs/pretrain/vit_l14.yaml strategy=fsdp
    deepspeed nepa_scale/train.py --ds_config ds_configs/zero3.json

Reads top to bottom: config -> task -> strategy -> loop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from nepa_scale.config import EXIT_USAGE, Config, ConfigError, load_config, to_dict
from nepa_scale.data import DataError, EvaluationStream, ShardSet, TrainStream
from nepa_scale.data.batch import Batch
from nepa_scale.data.remote import RemoteError
from nepa_scale.evaluation.online import KnnEvaluation, pixel_features
from nepa_scale.profiling import peak_flops, training_costs
from nepa_scale.sharding import (
    StepSettings,
    Strategy,
    World,
    build_strategy,
    choose_strategy,
    join_world,
    leave_world,
)
from nepa_scale.training.batching import plan_batches
from nepa_scale.training.checkpoint import Checkpointer, CheckpointFailure, find_checkpoint, load_shards, read_meta
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.loop import Run, Schedule, TrainingFailure, train
from nepa_scale.training.optimization import peak_learning_rate, total_steps, warmup_steps
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.progress import Tracker, WandbTracker
from nepa_scale.training.run_folder import forget_after, prepare_run_folder, require_same_run
from nepa_scale.training.run_lock import RunLock
from nepa_scale.training.summary import print_plan, print_summary

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "configs" / "pretrain" / "demo.yaml"
EXIT_FAILURE = 1
T = TypeVar("T")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nepa_scale/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key, its default and its meaning: nepa_scale/config.py. Examples: configs/.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML of the run (default: the demo)")
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        type=Path,
        help="DeepSpeed JSON; selects its ZeRO stage. Batch sizes, precision and clipping come from the run's YAML",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the YAML")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one rank; returns its exit status: 0 done, 1 failed, 2 the user's to mend."""
    # the processes that read data are forked from a server that has imported all of this once
    multiprocessing.set_forkserver_preload(["nepa_scale.train"])
    arguments = parse_arguments(argv)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        config = load_config(arguments.config, arguments.overrides)
        world = join_world(config.train.timeout)
        try:
            run(config, arguments.ds_config, world)
        finally:
            leave_world()
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except (TrainingFailure, DataError, RemoteError, CheckpointFailure) as error:
        if rank == 0 or not isinstance(error, TrainingFailure | CheckpointFailure):  # those come on every rank alike
            print(f"error (rank {rank}): {str(error).splitlines()[-1]}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    return 0


def run(config: Config, ds_config: Path | None, world: World) -> None:
    """The whole of a run, on every rank."""
    # config
    name, ds_values = together(world, lambda: choose_strategy(config.strategy, ds_config, world.size))
    plan = plan_batches(config.train, world.size)
    folder = Path(config.output)

    # task and data
    task = Pretraining(config)
    shards = together(world, lambda: open_shards(config.data.train, "data.train", config))
    val = together(world, lambda: open_shards(config.data.val, "data.val", config)) if config.data.val else None
    steps_per_epoch = together(world, lambda: count_steps(len(shards), config, plan.global_batch_size, world.size))
    schedule = Schedule(
        total=total_steps(config, steps_per_epoch),
        warmup=warmup_steps(config, steps_per_epoch),
        peak_lr=peak_learning_rate(config),
        final_lr_fraction=config.schedule.final_lr_fraction,
        steps_per_epoch=steps_per_epoch,
    )
    lock = together(world, lambda: claim_run_folder(folder, config) if world.is_main else None)

    # strategy
    settings = StepSettings(
        precision=config.train.precision,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
        clip=config.optimizer.clip,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        recompute=config.activation_checkpointing,
        compile=config.compile,
    )
    strategy = build_strategy(name, ds_values, world, task.build, task.groups, settings)
    average = MovingAverage(strategy.shards, config.ema.decay) if config.ema.decay > 0 else None
    checkpointer = Checkpointer(
        folder,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        rank=world.rank,
        world_size=world.size,
        stop_on_failure=config.checkpoint.stop_on_failure,
    )
    checkpointer.reserve(strategy.shards, replicated=strategy.replicated)
    start = restore(config, strategy, task, average, len(shards), folder)

    # loop
    costs = training_costs(task.architecture, peak_flops(world.device, config.train.precision))
    trackers: list[Tracker] = []
    if config.tracker == "wandb" and world.is_main:
        trackers.append(WandbTracker(str(folder), to_dict(config)))
    knn = make_knn(config, shards, val, task.architecture.image_size, world)
    job = Run(
        config=config,
        world=world,
        task=task,
        strategy=strategy,
        average=average,
        plan=plan,
        schedule=schedule,
        costs=costs,
        folder=folder,
        checkpointer=checkpointer,
        trackers=trackers,
        evaluate=evaluation(knn, strategy) if knn is not None else None,
        dataset_samples=len(shards),
    )
    stream = TrainStream(
        shards,
        config.data,
        image_size=task.architecture.image_size,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        start_step=start,
        bad_samples_file=folder / "bad_samples.jsonl",
    )
    if world.is_main:
        print_plan(job, start, len(shards))
    try:
        train(job, iter(stream), start)
    finally:
        stream.close()
        checkpointer.close()
        for tracker in trackers:
            tracker.close()
    if world.is_main:
        print_summary(folder)
    strategy.close()
    if lock is not None:
        lock.release()


def together(world: World, prepare: Callable[[], T]) -> T:
    """`prepare()` on every rank; a `ConfigError` of any is raised by all, so that no rank is left waiting."""
    result: T | None = None
    message: str | None = None
    try:
        result = prepare()
    except ConfigError as error:
        message = str(error)
    messages: list[str | None] = [None] * world.size
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise ConfigError(found)
    return result  # type: ignore[return-value]


def claim_run_folder(folder: Path, config: Config) -> RunLock:
    """Takes the run folder for this job; the main rank only. The lock ends with the process at the latest."""
    lock = RunLock(folder)
    try:
        prepare_run_folder(folder, config)
    except ConfigError:
        lock.release()
        raise
    return lock


def open_shards(source: str | None, key: str, config: Config) -> ShardSet:
    if source is None:
        raise ConfigError(f"{key} is not set: give a folder, brace pattern or URL of WebDataset shards")
    return ShardSet.open(source, config.data)


def count_steps(samples: int, config: Config, global_batch_size: int, world_size: int) -> int:
    if samples < world_size:
        raise ConfigError(f"data.train holds {samples} samples, fewer than the {world_size} ranks: start fewer ranks")
    if samples < global_batch_size and config.data.ragged == "drop":
        raise ConfigError(
            f"data.train holds {samples} samples, less than one batch of train.global_batch_size={global_batch_size}: "
            "lower it, or set data.ragged=pad"
        )
    full, rest = divmod(samples, global_batch_size)
    return full + (1 if rest and config.data.ragged == "pad" else 0)


def restore(
    config: Config,
    strategy: Strategy,
    task: Pretraining,
    average: MovingAverage | None,
    dataset_samples: int,
    folder: Path,
) -> int:
    """Fills the strategy from a checkpoint or with initial weights; returns the number of steps already made."""
    path = find_checkpoint(folder, config.train.resume)
    if path is None:
        for shard in strategy.shards:
            if shard.stop > shard.start:
                values = task.initial_values(shard.name, shard.shape).flatten()
                shard.tensors["master"].copy_(values[shard.start : shard.stop])
        step = 0
    else:
        meta = read_meta(path)
        require_same_run(meta["config"], config, str(path))
        if meta["dataset_samples"] != dataset_samples:
            raise ConfigError(
                f"{path} was trained on {meta['dataset_samples']} samples, data.train={config.data.train} holds "
                f"{dataset_samples}: resuming needs the same data"
            )
        load_shards(path, strategy.shards)
        strategy.set_optimizer_steps(meta["optimizer_steps"])
        step = meta["step"]
    strategy.refresh()
    if path is None and average is not None:
        average.restart()
    if strategy.world.is_main:
        forget_after(folder / "metrics.jsonl", step if path is not None else -1)
        for samples in (folder / "samples").glob("rank_*.jsonl"):
            forget_after(samples, step)
    return step


def make_knn(
    config: Config, shards: ShardSet, val: ShardSet | None, image_size: tuple[int, int], world: World
) -> KnnEvaluation | None:
    """The evaluation of the features, where both sets have labels."""
    if val is None or shards.classes is None or val.classes is None:
        return None

    def one_pass(source: ShardSet, limit: int | None) -> Callable[[], Iterable[Batch]]:
        return lambda: EvaluationStream(
            source,
            config.data,
            image_size=image_size,
            batch_size=config.evaluate.batch_size,
            rank=world.rank,
            world_size=world.size,
            limit=limit,
        )

    return KnnEvaluation(
        one_pass(shards, config.evaluate.bank), one_pass(val, None), max(shards.classes, val.classes), world
    )


def evaluation(knn: KnnEvaluation, strategy: Strategy) -> Callable[[], dict[str, float]]:
    """The loop's evaluation; its first call of a run also measures what training has to beat."""

    def evaluate() -> dict[str, float]:
        top1 = knn.of_strategy(strategy)
        if strategy.optimizer_steps() > 0:
            return {"knn_top1": top1}
        return {"knn_top1": top1, "knn_top1_untrained": top1, "knn_top1_pixels": knn.top1(pixel_features)}

    return evaluate


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
