"""How fast the training step of a configuration is here, where its time goes, and what share of the peak that is.

The step is the real one: the run's model, strategy, optimiser, precision and batch, on images that are already on the
device, or from the run's own data stream. Launches are left to torchrun or deepspeed; functions here are collective.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nepa_scale.config import Config, ConfigError
from nepa_scale.data import ShardSet, TrainStream
from nepa_scale.data.batch import Batch
from nepa_scale.models import Architecture
from nepa_scale.objectives import is_causal
from nepa_scale.profiling.devices import peak_flops
from nepa_scale.profiling.flops import count_flops
from nepa_scale.sharding import Strategy, World, build_strategy, choose_compilation, choose_strategy, max_over_ranks
from nepa_scale.training.batching import BatchPlan, plan_batches, step_settings
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.teacher import make_teacher

PHASES = ("data", "forward", "backward", "optimizer", "communication")
_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter", "reduce_scatter_tensor",
    "reduce_scatter_single", "_reduce_scatter_base", "reduce", "broadcast", "barrier",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Least, median and largest of some repetitions."""

    least: float
    median: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Throughput:
    """Rates of the whole job; seconds of a step on its slowest rank, medians over the timed steps.

    split: seconds of each of `PHASES`, of steps that wait for the device after every phase, and therefore are slower
        than `step_seconds`; communication is what Python's collectives take, and part of no other phase
    peak_source: "data sheet", "measured product" (of this device, now), or None
    """

    strategy: str
    world_size: int
    micro_batch: int
    accumulation: int
    images_per_second: Spread
    tokens_per_second: float
    step_seconds: Spread
    split: dict[str, float]
    mfu: float | None
    hfu: float | None
    peak_flops: float | None
    peak_source: str | None
    peak_memory_bytes: int
    steps: int

    def to_json(self) -> dict[str, Any]:
        """The keys of `tools/throughput.py --json`: medians under the plain names, their spread beside them."""
        facts = asdict(self)
        for name in ("images_per_second", "step_seconds"):
            spread = getattr(self, name)
            facts[name] = spread.median
            facts[f"{name}_spread"] = [spread.least, spread.most]
        return facts


class StepRunner:
    """A configuration's strategy, its batches, and the step that the training loop makes of them.

    Raises:
        ConfigError: numbers that cannot be, or a configuration of fine-tuning.
    """

    def __init__(self, config: Config, world: World, ds_config: Path | None = None) -> None:
        if config.task != "pretrain":
            raise ConfigError(f"the step that is timed is that of pretraining, not of task={config.task}")
        name, values = choose_strategy(config.strategy, ds_config, world.size)
        self.config, self.world = config, world
        self.plan: BatchPlan = plan_batches(config.train, world.size)
        self.task = Pretraining(config)
        compiled, _ = choose_compilation(config.compile, world.device)
        settings = step_settings(config, self.plan, compiled=compiled)
        self.strategy: Strategy = build_strategy(name, values, world, self.task.build, self.task.groups, settings)
        self.task.initialize(self.strategy.shards)
        self.strategy.refresh()
        self.average = MovingAverage(self.strategy.shards) if config.ema.decay > 0 else None
        self.teacher = make_teacher(config, self.strategy, self.average)
        self.stream = self._open_stream()
        noise = self.noise(self.plan.micro_batch_size, self.task.architecture.image_size, world.device)
        self.batches: Iterator[Batch] = itertools.repeat(noise) if self.stream is None else iter(self.stream)

    def _open_stream(self) -> TrainStream | None:
        if self.config.data.train is None:
            return None
        return TrainStream(
            ShardSet.open(self.config.data.train, self.config.data),
            self.config.data,
            image_size=self.task.architecture.image_size,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            seed=self.config.train.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    @staticmethod
    def noise(count: int, size: tuple[int, int], device: torch.device) -> Batch:
        """Images of `size` (height, width) on the device, without labels that mean anything."""
        images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, device=device)
        keys = torch.arange(count, device=device)
        flip = torch.zeros(count, dtype=torch.bool, device=device)
        return Batch(images, flip, keys, keys, keys, keys.cpu().numpy(), [])

    def step(self, mark: Callable[[str], None]) -> None:
        """One optimiser step; `mark(phase)` is called at the end of each phase but forward's and backward's seam."""
        outputs: dict[str, Tensor] = {}
        for micro_step in range(self.plan.accumulation):
            batch = next(self.batches).to_device(self.world.device)
            mark("data")
            inputs = self.task.inputs(batch, 0)
            if self.teacher is not None:
                inputs = self.teacher.teach(inputs)
            outputs = self.strategy.forward_backward(inputs, micro_step)
            self.task.diagnostics(outputs)
            mark("backward")
        norm = self.strategy.step(1e-6)
        if self.average is not None:
            self.average.update(~norm.isfinite(), self.config.ema.decay)
        mark("optimizer")
        del outputs

    def close(self) -> None:
        """Ends the stream's workers and the strategy."""
        if self.stream is not None:
            self.stream.close()
        self.strategy.close()


def measure_throughput(
    config: Config, world: World, *, ds_config: Path | None = None, steps: int = 10, warmup: int = 3,
    measured_peak: bool = False, trace: Path | None = None,
) -> Throughput:  # fmt: skip
    """Times `steps` steps after `warmup` untimed ones, then a few that are split into phases. Collective.

    measured_peak: hold the rate against a matrix product timed here where no data sheet is known
    trace: write a Chrome trace of two further steps (and on a GPU a snapshot of its memory beside it)
    """
    runner = StepRunner(config, world, ds_config)
    device = world.device
    try:
        for _ in range(warmup):
            runner.step(_ignore)
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for _ in range(steps):
            dist.barrier()
            began = time.perf_counter()
            runner.step(_ignore)
            synchronize(device)
            seconds.append(max_over_ranks(time.perf_counter() - began, device))
        memory = int(max_over_ranks(_peak_memory(device), device))
        split = _split(runner, max(2, steps // 2))
        if trace is not None:
            write_trace(runner, trace)
    finally:
        runner.close()
    peak, source = _peak(device, config.train.precision, measured_peak)
    return _summary(config, runner, world, seconds, split, memory, peak, source)


def _summary(
    config: Config, runner: StepRunner, world: World, seconds: list[float], split: dict[str, float], memory: int,
    peak: float | None, source: str | None,
) -> Throughput:  # fmt: skip
    a: Architecture = runner.task.architecture
    batch = runner.plan.global_batch_size
    model = asdict(config.model)
    causal = is_causal(config.objective)
    count = count_flops(**model, objective=config.objective, recompute=config.activation_checkpointing, causal=causal)
    rates = Spread.of([batch / second for second in seconds])
    share = rates.median / (peak * world.size) if peak else None
    return Throughput(
        strategy=runner.strategy.name,
        world_size=world.size,
        micro_batch=runner.plan.micro_batch_size,
        accumulation=runner.plan.accumulation,
        images_per_second=rates,
        tokens_per_second=rates.median * a.tokens,
        step_seconds=Spread.of(seconds),
        split=split,
        mfu=share * count.train_flops_per_image if share else None,
        hfu=share * count.hardware_flops_per_image if share else None,
        peak_flops=peak,
        peak_source=source,
        peak_memory_bytes=memory,
        steps=len(seconds),
    )


def _split(runner: StepRunner, steps: int) -> dict[str, float]:
    """Median seconds of each phase on this rank, waiting for the device between them."""
    rows: list[dict[str, float]] = []
    device = runner.world.device
    with _forward_ends(runner.strategy.module) as forward, _timed_collectives(device) as waited:
        for _ in range(steps):
            row = dict.fromkeys(PHASES, 0.0)
            clock = _Clock(device, waited)

            def mark(phase: str, clock: _Clock = clock, row: dict[str, float] = row) -> None:
                row[phase] += clock.lap()

            def ended(clock: _Clock = clock, row: dict[str, float] = row) -> None:
                row["forward"] += clock.lap()

            forward.append(ended)
            runner.step(mark)
            forward.clear()
            row["communication"] = clock.communication
            rows.append(row)
    return {phase: statistics.median(row[phase] for row in rows) for phase in PHASES}


class _Clock:
    """Laps on the host with an empty device queue, less the time spent in collectives, which it sums up."""

    def __init__(self, device: torch.device, waited: list[float]) -> None:
        self.device, self.waited = device, waited
        self.communication = 0.0
        synchronize(device)
        self.waited[0] = 0.0
        self.began = time.perf_counter()

    def lap(self) -> float:
        synchronize(self.device)
        now = time.perf_counter()
        spent, self.began = now - self.began, now
        waited, self.waited[0] = self.waited[0], 0.0
        self.communication += waited
        return max(0.0, spent - waited)


@contextlib.contextmanager
def _forward_ends(module: nn.Module) -> Iterator[list[Callable[[], None]]]:
    """Calls what the list holds whenever the module's forward pass ends."""
    callbacks: list[Callable[[], None]] = []

    def hook(*_: Any) -> None:
        for callback in callbacks:
            callback()

    handle = module.register_forward_hook(hook)
    try:
        yield callbacks
    finally:
        handle.remove()


@contextlib.contextmanager
def _timed_collectives(device: torch.device) -> Iterator[list[float]]:
    """Adds the seconds of every collective that Python calls to the list's one number, each waited for to its end.

    DDP's are called from C++, beside the backward pass: they are not seen, and count as backward.
    """
    waited = [0.0]
    originals = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            began = time.perf_counter()
            work = original(*args, **kwargs)
            if work is not None and hasattr(work, "wait"):
                work.wait()
            synchronize(device)
            waited[0] += time.perf_counter() - began
            return work

        return call

    for name, original in originals.items():
        setattr(dist, name, timed(original))
    try:
        yield waited
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def write_trace(runner: StepRunner, path: Path) -> None:
    """A Chrome trace of two steps of rank 0 (chrome://tracing, ui.perfetto.dev), on a GPU with a memory snapshot."""
    device = runner.world.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            runner.step(_ignore)
        synchronize(device)
    if not runner.world.is_main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(path.with_suffix(".memory.pickle")))
        torch.cuda.memory._record_memory_history(enabled=None)


def measured_product_rate(device: torch.device, precision: str, width: int | None = None) -> float:
    """FLOP/s of this device in a large square matrix product, the best of several: a peak where none is published."""
    width = width or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        one @ other
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * width**3 / best


def _peak(device: torch.device, precision: str, measured: bool) -> tuple[float | None, str | None]:
    known = peak_flops(device, precision)
    if known is not None:
        return known, "data sheet"
    return (measured_product_rate(device, precision), "measured product") if measured else (None, None)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def synchronize(device: torch.device) -> None:
    """Waits for the device; a host needs none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ignore(_phase: str) -> None:
    """No timing."""
