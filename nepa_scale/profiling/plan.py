"""What to run on given GPUs: which strategies fit, how fast they are on paper, and what it costs.

The step time is a roofline with stated assumptions (`Assumptions`): matrix products at a share of the peak,
element-wise work at a share of the memory's bandwidth, collectives over rings whose slowest link counts, hidden behind
the backward pass as far as the overlap allows. Nothing here is measured; `tools/throughput.py` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from nepa_scale.config import ConfigError, ModelConfig
from nepa_scale.models import Architecture, resolve_architecture
from nepa_scale.profiling.activations import Shape, block_activations, ends_activations
from nepa_scale.profiling.communication import step_volume
from nepa_scale.profiling.devices import Device
from nepa_scale.profiling.flops import RECOMPUTE, forward_flops, kernel_flops, recomputed_flops, train_flops
from nepa_scale.profiling.memory import predict
from nepa_scale.profiling.parameters import count_parameters
from nepa_scale.profiling.setup import Setup

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "zero3")
IMAGENET = 1_281_167
LARGEST_MICRO_BATCH = 512


@dataclass(frozen=True)
class Assumptions:
    """What the paper step time stands on."""

    product_efficiency: float = 0.6  # of the peak, in matrix products and attention
    bandwidth_efficiency: float = 0.8  # of the memory's bandwidth, in element-wise work
    passes: float = 4.0  # over each kept activation: written and read in either direction
    link_efficiency: float = 0.7  # of the links' bandwidth, in collectives
    overlap: float = 0.8  # share of a backward pass behind which communication can hide
    latency: float = 15e-6  # seconds of one collective for each doubling of the ranks
    reserve: float = 0.06  # of the memory, for fragmentation
    framework: float = 1.5e9  # bytes of the driver, kernels and communicators on each GPU


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    model: ModelConfig
    gpus: int
    device: Device
    global_batch: int = 4096
    epochs: float = 800
    samples: int = IMAGENET
    precision: str = "bf16"
    ema: bool = True
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.device.memory * (1 - self.assumptions.reserve) - self.assumptions.framework

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.device.per_host)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step: what adds up, and the communication that is hidden."""

    products: float
    elementwise: float
    optimizer: float
    communication: float  # exposed
    hidden: float

    @property
    def total(self) -> float:
        return self.products + self.elementwise + self.optimizer + self.communication


@dataclass(frozen=True)
class Choice:
    """One strategy with its best micro-batch and recomputation, or with those that come nearest to fitting."""

    strategy: str
    micro_batch: int
    accumulation: int
    recompute: str
    memory: int
    fits: bool
    time: StepTime
    images_per_second: float
    mfu: float
    days: float
    device_hours: float
    change: str  # where it does not fit: what would make it

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"step_seconds": self.time.total}


def plan(job: Job) -> list[Choice]:
    """The best choice of every strategy: those that fit first, the fastest of them leading; of those that are within a
    hundredth of it, the one that takes the least memory.

    Raises:
        ConfigError: a global batch that does not divide over the GPUs.
    """
    if job.global_batch % job.gpus:
        raise ConfigError(
            f"--global-batch {job.global_batch} does not divide over {job.gpus} GPUs; nearest that do: "
            f"{max(job.global_batch // job.gpus, 1) * job.gpus}, {(job.global_batch // job.gpus + 1) * job.gpus}"
        )
    architecture = resolve_architecture(job.model)
    names = ("single",) if job.gpus == 1 else STRATEGIES
    choices = [_best(job, architecture, name) for name in names]
    fastest = min(choice.time.total for choice in choices if choice.fits or not any(c.fits for c in choices))
    return sorted(choices, key=lambda choice: (not choice.fits, round(choice.time.total / fastest, 2), choice.memory))


def _best(job: Job, a: Architecture, strategy: str) -> Choice:
    """The fastest that fits; where none does, the smallest."""
    found = list(_variants(job, a, strategy))
    fitting = [choice for choice in found if choice.fits]
    if fitting:
        return min(fitting, key=lambda choice: choice.time.total)
    smallest = min(found, key=lambda choice: choice.memory)
    return Choice(**{**smallest.__dict__, "change": _change(job, smallest)})


def _variants(job: Job, a: Architecture, strategy: str) -> Iterator[Choice]:
    per_rank = job.global_batch // job.gpus
    for recompute in RECOMPUTE:
        for micro in (n for n in range(1, min(per_rank, LARGEST_MICRO_BATCH) + 1) if per_rank % n == 0):
            setup = Setup(job.model, strategy, job.gpus, micro, job.precision, recompute, job.ema)
            memory = predict(setup).total
            time = step_time(job, a, strategy, micro, per_rank // micro, recompute)
            steps = job.epochs * job.samples / job.global_batch
            rate = job.global_batch / time.total
            yield Choice(
                strategy=strategy,
                micro_batch=micro,
                accumulation=per_rank // micro,
                recompute=recompute,
                memory=memory,
                fits=memory <= job.usable,
                time=time,
                images_per_second=rate,
                mfu=rate * train_flops(a) / (job.gpus * job.device.peak),
                days=steps * time.total / 86400,
                device_hours=steps * time.total / 3600 * job.gpus,
                change="",
            )
            if memory > job.usable:
                break  # larger ones do not fit either


def step_time(job: Job, a: Architecture, strategy: str, micro: int, accumulation: int, recompute: str) -> StepTime:
    """Seconds of one optimiser step on paper."""
    s, device = job.assumptions, job.device
    images = micro * accumulation
    flops = train_flops(a) + sum(recomputed_flops(a, recompute).values()) + sum(kernel_flops(a).values())
    products = images * flops / (s.product_efficiency * device.peak)
    shape = Shape(a, micro, job.precision, cast=False)
    kept = a.depth * sum(block_activations(shape).values()) + sum(ends_activations(shape).values())
    passes = s.passes + (0 if recompute == "none" else s.passes / 2)  # the forward pass's, once more
    memory = s.bandwidth_efficiency * device.bandwidth
    parameters = count_parameters(a)
    held = parameters if strategy in ("single", "ddp") else parameters / job.gpus
    # weights, gradients, two moments, average, read; all but the gradients written: 4 bytes each
    optimizer = held * 4 * (5 + 4) / memory
    elementwise = accumulation * passes * kept / memory
    wire = communication_time(job, a, strategy, accumulation)
    backward = (products + elementwise) * (1 - sum(forward_flops(a).values()) / flops)
    if strategy in ("ddp", "zero1"):
        backward /= accumulation  # only the last micro-batch's has something to hide
    hidden = min(wire, s.overlap * backward)
    return StepTime(products, elementwise, optimizer, wire - hidden, hidden)


def communication_time(job: Job, a: Architecture, strategy: str, accumulation: int) -> float:
    """Seconds of a step's collectives over the slowest link that their rings cross, were nothing hidden.

    Between hosts as many rings run side by side as a host has accelerators, each over another network card.
    """
    if job.gpus == 1:
        return 0.0
    s, parameters = job.assumptions, count_parameters(a)
    link = (
        job.device.link
        if job.gpus <= job.device.per_host
        else min(job.device.link, job.device.network * job.device.per_host)
    )
    sent = step_volume(strategy, parameters, job.precision, accumulation).sent(job.gpus)
    # by unit where weights are gathered, by bucket (DDP 25 MB, DeepSpeed 1e8 elements) where they are not
    calls = {
        "ddp": parameters * 4 / 25e6, "zero1": 2 * parameters / 1e8, "zero2": 2 * parameters / 1e8 * accumulation,
        "fsdp": 3 * (a.depth + 2) * accumulation, "zero3": 3 * (a.depth + 2) * accumulation,
    }[strategy]  # fmt: skip
    return sent / (s.link_efficiency * link) + math.ceil(calls) * s.latency * math.log2(job.gpus)


def _change(job: Job, smallest: Choice) -> str:
    """What would make the strategy's smallest variant fit."""
    lacking = (smallest.memory - job.usable) / 1e9
    text = f"lacks {lacking:.1f} GB even with micro-batch {smallest.micro_batch} and recomputation {smallest.recompute}"
    gpus = job.gpus
    while gpus < 16384 and smallest.strategy not in ("single", "ddp"):
        gpus *= 2
        setup = Setup(
            job.model, smallest.strategy, gpus, smallest.micro_batch, job.precision, smallest.recompute, job.ema
        )
        if predict(setup).total <= job.usable:
            return f"{text}: would fit on {gpus} of these GPUs"
    needed = (smallest.memory + job.assumptions.framework) / (1 - job.assumptions.reserve)
    return f"{text}: needs GPUs of {needed / 1e9:.0f} GB, or a strategy that shards more"
