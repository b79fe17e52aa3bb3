"""Pretrains a causal ViT by next-embedding prediction: the one entry point, for every strategy and launcher.

    python nepa_scale/train.py --config configs/pretrain/demo.yaml
    torchrun --nproc_per_node 8 nepa_scale/train.py --config configs/pretrain/vit_l14.yaml strategy=fsdp
    deepspeed nepa_scale/train.py --ds_config ds_configs/zero3.json

Reads top to bottom: config -> task -> strategy -> loop.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds: a signal must not find the program unprepared
    from nepa_scale.training.signals import stop_signals

    stop_signals.install()

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import yaml

from nepa_scale.command_line import deliver
from nepa_scale.config import EXIT_USAGE, Config, ConfigError, load_config, to_dict
from nepa_scale.data import DataError, ShardSet, TrainStream
from nepa_scale.data.order import steps_per_epoch
from nepa_scale.data.overlap import same_samples
from nepa_scale.data.remote import RemoteError
from nepa_scale.evaluation.while_training import Passes, Validation, make_evaluation, make_validation
from nepa_scale.profiling import Costs, peak_flops, training_costs
from nepa_scale.sharding import (
    World,
    build_strategy,
    choose_compilation,
    choose_strategy,
    complete_ds_config,
    join_world,
    leave_world,
)
from nepa_scale.training.agreement import Agreement, StopRequest
from nepa_scale.training.backward_probe import BackwardProbe
from nepa_scale.training.batching import BatchPlan, plan_batches, step_settings
from nepa_scale.training.checkpoint import Checkpointer, CheckpointFailure
from nepa_scale.training.departure import EXIT_FAILURE, depart, on_departure
from nepa_scale.training.dry_run import describe as describe_plan
from nepa_scale.training.dry_run import facts_of
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.finetuning import Finetuning
from nepa_scale.training.loop import Position, Run, train
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.resumption import refuse_finished, restore, rewind
from nepa_scale.training.run_folder import prepare_run_folder
from nepa_scale.training.run_lock import RunLock
from nepa_scale.training.schedule import Schedule
from nepa_scale.training.signals import EXIT_STOPPED, describe, stop_signals
from nepa_scale.training.skips import TooManySkipped, TrainingFailure
from nepa_scale.training.summary import print_plan, print_summary
from nepa_scale.training.teacher import make_teacher
from nepa_scale.training.tracking import Tracker, WandbTracker
from nepa_scale.training.update_guard import UpdateGuard
from nepa_scale.training.watchdog import Watchdog

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "configs" / "pretrain" / "demo.yaml"
T = TypeVar("T")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nepa_scale/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key, its default and its meaning: nepa_scale/config.py. Examples: configs/.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        help="YAML of the run (default: the demo); given again, a file over those before it",
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        type=Path,
        help="DeepSpeed JSON; selects its ZeRO stage. Batch sizes, precision and clipping come from the run's YAML",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, and end")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, data and batches, print the plan, and end: nothing is trained or written",
    )
    parser.add_argument("--json", metavar="FILE", help="with --dry-run: write the plan as JSON; - for stdout")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the YAML")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one rank; returns its exit status: 0 done, 1 failed, 2 the user's to mend, 75 stopped and saved."""
    # the processes that read data are forked from a server that has imported all of this once
    multiprocessing.set_forkserver_preload(["nepa_scale.train"])
    arguments = parse_arguments(argv)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        config = load_config(arguments.config or DEFAULT_CONFIG, arguments.overrides)
        if arguments.json and not arguments.dry_run:
            raise ConfigError("--json is for the plan of --dry-run: a run writes its metrics to its folder")
        if arguments.print_config:
            if rank == 0:
                print(yaml.safe_dump(to_dict(config), sort_keys=False), end="", flush=True)
            return 0
        world = join_world(config.train.timeout)
        try:
            if arguments.dry_run:
                dry_run(config, arguments.ds_config, world, arguments.json)
                return 0
            stop = run(config, arguments.ds_config, world)
        finally:
            leave_world()
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except (TrainingFailure, CheckpointFailure) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    except Exception:
        if stop_signals.asked():  # the other ranks were, too, and have left first
            return EXIT_STOPPED
        raise
    return 0 if stop is None else EXIT_STOPPED


def run(config: Config, ds_config: Path | None, world: World) -> StopRequest | None:
    """The whole of a run, on every rank; returns what made it save and stop before its end, if anything did."""
    # config
    name, ds_values = together(world, lambda: choose_strategy(config.strategy, ds_config, world.size))
    plan = plan_batches(config.train, world.size)
    folder = Path(config.output)

    lock = together(world, lambda: claim_run_folder(folder) if world.is_main else contextlib.nullcontext())
    agreed = (ConfigError, TrainingFailure, CheckpointFailure)  # come on every rank alike
    watchdog = Watchdog(folder, world, config.train.timeout, agreed=agreed, brief=(DataError, RemoteError))
    with lock, watchdog:
        # task and data
        shards, validation, task, schedule = prepare(config, plan, world)
        named = name if ds_config is not None or config.strategy != "auto" else None
        together(world, lambda: refuse_finished(folder, config, named, schedule.total) if world.is_main else None)
        together(world, lambda: prepare_run_folder(folder, config) if world.is_main else None)

        # strategy
        compiled, why_not = together(world, lambda: choose_compilation(config.compile, world.device))
        if world.is_main and why_not:
            print(f"not compiled, as torch.compile does not work here: {why_not}", file=sys.stderr)
        settings = step_settings(config, plan, compiled=compiled)
        strategy = build_strategy(name, ds_values, world, task.build, task.groups, settings)
        average = MovingAverage(strategy.shards) if config.ema.decay > 0 else None
        checkpointer = Checkpointer(
            folder,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            rank=world.rank,
            world_size=world.size,
            stop_on_failure=config.checkpoint.stop_on_failure,
        )
        together(world, lambda: checkpointer.reserve(strategy.shards, replicated=strategy.replicated))

        # loop
        agreement = Agreement(world, stop_signals.asked)
        passes = Passes(config, task.architecture.image_size, world, agreement, watchdog)
        job = Run(
            config=config,
            world=world,
            task=task,
            strategy=strategy,
            average=average,
            teacher=make_teacher(config, strategy, average),
            guard=UpdateGuard(config.train.spike_factor, world.device),
            probe=BackwardProbe(strategy.module, world.device),
            plan=plan,
            schedule=schedule,
            costs=make_costs(config, task, world),
            folder=folder,
            checkpointer=checkpointer,
            watchdog=watchdog,
            agreement=agreement,
            trackers=make_trackers(config, world),
            evaluate=make_evaluation(task, shards, validation, passes, strategy, average),
            dataset_samples=len(shards),
            class_names=shards.class_names if config.task == "finetune" else None,
        )

        def stream_from(position: Position) -> TrainStream:
            first = position.step + position.passed_over
            return open_stream(config, shards, task, plan, world, first, folder / "bad_samples.jsonl")

        start = restore(job)
        if world.is_main:
            print_plan(job, start.step, len(shards))
        stop_signals.training_begins()
        try:
            stop = train_on(job, stream_from, start)
        finally:
            checkpointer.close()
            for tracker in job.trackers:
                tracker.close()
    if stop is not None:
        stop_signals.saved()
    if world.is_main and stop is None:
        print_summary(folder)
    elif stop is not None and (world.is_main or stop.rank == world.rank):
        print(f"rank {world.rank} stops: {describe(stop.number)}; the same command goes on from here", flush=True)
    strategy.close()
    return stop


def prepare(
    config: Config, plan: BatchPlan, world: World
) -> tuple[ShardSet, Validation | None, Pretraining | Finetuning, Schedule]:
    """The shards of data.train, what is evaluated on, what is trained, and for how long. Collective."""
    shards = together(world, lambda: open_shards(config.data.train, "data.train", config))
    validation = open_validation(shards, config, world) if config.data.val else None
    task = together(world, lambda: make_task(config, shards, plan.micro_batch_size))
    epoch_steps = together(world, lambda: count_steps(len(shards), config, plan.global_batch_size, world.size))
    return shards, validation, task, Schedule.of(config, epoch_steps)


def open_stream(
    config: Config,
    shards: ShardSet,
    task: Pretraining | Finetuning,
    plan: BatchPlan,
    world: World,
    first: int = 0,
    bad_samples_file: Path | None = None,
) -> TrainStream:
    """This rank's micro-batches from the global batch `first` on."""
    return TrainStream(
        shards,
        config.data,
        image_size=task.architecture.image_size,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        start_step=first,
        rand_augment=config.augment.rand_augment,
        classes=task.classes if isinstance(task, Finetuning) else None,
        bad_samples_file=bad_samples_file,
    )


def read_a_batch(
    config: Config, shards: ShardSet, task: Pretraining | Finetuning, plan: BatchPlan, world: World
) -> None:
    """Raises ConfigError where the first micro-batch cannot be read."""
    here = replace(config, data=replace(config.data, workers=0))
    try:
        with contextlib.closing(open_stream(here, shards, task, plan, world)) as stream:
            next(iter(stream))
    except (DataError, RemoteError) as error:
        raise ConfigError(f"data.train={config.data.train}: {error}") from error


def dry_run(config: Config, ds_config: Path | None, world: World, where: str | None) -> None:
    """Checks what a run would check before it trains, and prints its plan; `where`: the JSON's file. Collective."""
    name, ds_values = together(world, lambda: choose_strategy(config.strategy, ds_config, world.size))
    plan = plan_batches(config.train, world.size)
    shards, _, task, schedule = prepare(config, plan, world)
    complete_ds_config(name, ds_values, step_settings(config, plan), world.size)
    together(world, lambda: read_a_batch(config, shards, task, plan, world))
    with torch.device("meta"):
        groups = task.groups([parameter for parameter, _ in task.build().named_parameters()])
    if not world.is_main:
        return
    facts = facts_of(
        config,
        strategy=name,
        world_size=world.size,
        plan=plan,
        schedule=schedule,
        groups=groups,
        costs=make_costs(config, task, world),
        parameters=task.parameters,
        samples=len(shards),
    )
    weights = config.finetune.weights if config.task == "finetune" else None
    if weights is not None and not Path(weights).exists():
        print(f"finetune.weights={weights} is not there yet", file=sys.stderr)
    try:
        deliver(facts, describe_plan(facts, schedule, groups), where)
    except OSError as error:
        raise ConfigError(f"cannot write {where}: {error.strerror}") from error


def train_on(job: Run, open_stream: Callable[[Position], TrainStream], position: Position) -> StopRequest | None:
    """Trains from `position` on, going back before steps that had to be skipped where the run is to do so."""
    rewinds: Counter[int] = Counter()
    while True:
        stream = open_stream(position)
        try:
            return train(job, iter(stream), position)
        except TooManySkipped as failure:
            position = rewind(job, failure, position, rewinds)
        finally:
            stream.close()


def together(world: World, prepare: Callable[[], T]) -> T:
    """`prepare()` on every rank. What it raises on one is raised by all, so that no rank is left waiting.

    Raises:
        ConfigError: that of the first rank that has one.
        TrainingFailure: on the ranks that were well, where another raised something else.
    """
    result: T | None = None
    found: tuple[str, bool] | None = None
    try:
        result = prepare()
    except ConfigError as error:
        found = str(error), True
    except Exception as error:
        found = f"rank {world.rank} failed: {type(error).__name__}: {error}", False
        raised = error
    problems: list[tuple[str, bool] | None] = [None] * world.size
    dist.all_gather_object(problems, found)
    for problem in sorted(filter(None, problems), key=lambda problem: not problem[1]):
        if problem[1]:
            raise ConfigError(problem[0])
        raise raised if found is not None else TrainingFailure(problem[0])
    return result  # type: ignore[return-value]


def claim_run_folder(folder: Path) -> RunLock:
    """Takes the run folder for this job; the main rank only. The lock ends with the process at the latest."""
    lock = RunLock(folder)
    on_departure(lambda _: lock.release())
    Watchdog.clear(folder)
    return lock


def open_shards(source: str | None, key: str, config: Config) -> ShardSet:
    if source is None:
        raise ConfigError(f"{key} is not set: give a folder, brace pattern or URL of WebDataset shards")
    return ShardSet.open(source, config.data)


def open_validation(shards: ShardSet, config: Config, world: World) -> Validation:
    """The shards of data.val, held against those of data.train; says what is to be known of them. Collective."""
    val = together(world, lambda: open_shards(config.data.val, "data.val", config))
    same = together(world, lambda: same_samples(val, shards) if world.is_main else 0)  # reads: one rank does
    validation = together(world, lambda: make_validation(shards, val, config, same))
    if world.is_main:
        for note in validation.notes:
            print(f"warning: {note}", file=sys.stderr, flush=True)
    return validation


def count_steps(samples: int, config: Config, global_batch_size: int, world_size: int) -> int:
    """Of an epoch."""
    if samples < world_size:
        raise ConfigError(f"data.train holds {samples} samples, fewer than the {world_size} ranks: start fewer ranks")
    steps = steps_per_epoch(samples, global_batch_size, config.data.ragged)
    if steps == 0:
        raise ConfigError(
            f"data.train holds {samples} samples, less than one batch of train.global_batch_size={global_batch_size}: "
            "lower it, or set data.ragged=pad"
        )
    return steps


def make_task(config: Config, shards: ShardSet, micro_batch_size: int) -> Pretraining | Finetuning:
    if config.task == "finetune":
        return Finetuning(config, shards.classes, micro_batch_size)
    for name in ("erase", "mixup", "cutmix"):
        if getattr(config.augment, name) > 0:
            raise ConfigError(f"augment.{name} is for task=finetune: set it to 0 to pretrain")
    return Pretraining(config)


def make_costs(config: Config, task: Pretraining | Finetuning, world: World) -> Costs:
    objective = config.objective if config.task == "pretrain" else None
    return training_costs(task.architecture, peak_flops(world.device, config.train.precision), objective)


def make_trackers(config: Config, world: World) -> list[Tracker]:
    return [WandbTracker(Path(config.output), to_dict(config))] if config.tracker == "wandb" and world.is_main else []


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    depart(main())
