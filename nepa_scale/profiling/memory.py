"""The memory of a training step in closed form: bytes on the fullest rank, by component, at the step's fullest moment.

What is always there (parameters, masters, moments, average) follows from how a strategy shards. What comes and goes is
followed through the step: activations pile up in the forward pass and go block by block in the backward pass, while
gradients arrive; the peak is the largest of a few moments, each a sum of formulas. `memory_measured` measures the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import CHOICES, ConfigError, ModelConfig, nearest
from nepa_scale.models import Architecture, resolve_architecture
from nepa_scale.objectives.next_embedding import IMAGES_AT_A_TIME
from nepa_scale.profiling.activations import (
    FLOAT,
    Shape,
    block_activations,
    ends_activations,
    full_activations,
    selective_activations,
)
from nepa_scale.profiling.parameters import Shapes, Units, elements, parameter_units
from nepa_scale.profiling.setup import Setup
from nepa_scale.sharding.ds_config import DS_CONFIGS, read_ds_config

COMPONENTS = (
    "parameters", "gradients", "masters", "moments", "ema", "activations", "temporaries", "communication", "inputs",
    "framework",
)  # fmt: skip
ZERO1_BUCKET = 500_000_000  # elements that DeepSpeed's bf16 optimiser of stage 1 reduces at a time


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of the fullest rank at its peak.

    components: by `COMPONENTS`; their sum is the peak of what the device's allocator hands out
    activations: the activations among them, by kind
    moment: when the peak is
    host: bytes of offloaded state in the host's memory, for this rank
    """

    setup: Setup
    components: dict[str, int]
    activations: dict[str, int]
    moment: str
    host: int

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def to_json(self) -> dict[str, Any]:
        """The components and `total`, flat, and what else is known."""
        return {
            **self.components,
            "total": self.total,
            "activations_by_kind": self.activations,
            "moment": self.moment,
            "host": self.host,
        }


@dataclass(frozen=True)
class Moment:
    """One candidate for the peak: what is there beyond the sharded state."""

    name: str
    activations: dict[str, int]
    gradients: int
    temporaries: int
    communication: int


def predict_memory(
    size: str = "vit_b",
    patch_size: int = 14,
    image_size: int | tuple[int, int] | list[int] = 224,
    *,
    strategy: str = "ddp",
    world_size: int = 1,
    micro_batch: int = 8,
    precision: str = "bf16",
    recompute: str = "none",
    ema: bool = True,
    offload: bool = False,
    **model: Any,
) -> Memory:
    """The memory of pretraining a named size; further keywords are the fields of `ModelConfig`.

    Raises:
        ConfigError: unknown names, impossible numbers, or a combination that cannot be.
    """
    sides = image_size if isinstance(image_size, int) else list(image_size)
    config = ModelConfig(size=size, patch_size=patch_size, image_size=sides, **model)
    return predict(Setup(config, strategy, world_size, micro_batch, precision, recompute, ema, offload))


def predict(setup: Setup) -> Memory:
    """The memory of `setup`. Raises ConfigError as `predict_memory` does."""
    check(setup)
    architecture = resolve_architecture(setup.model)
    units = parameter_units(architecture)
    state, host = _state(setup, units)
    peak = max(_moments(setup, architecture, units), key=_size)
    images = setup.micro_batch * 3 * architecture.image_size[0] * architecture.image_size[1] * FLOAT
    found = {
        **state,
        "gradients": peak.gradients,
        "activations": sum(peak.activations.values()),
        "temporaries": peak.temporaries,
        "communication": peak.communication,
        "inputs": images,
        "framework": 0,
    }
    return Memory(setup, {name: found.get(name, 0) for name in COMPONENTS}, peak.activations, peak.name, host)


def check(setup: Setup) -> None:
    """Raises ConfigError where the setup cannot exist."""
    for name, value, options in (
        ("strategy", setup.strategy, tuple(s for s in CHOICES["strategy"] if s != "auto")),
        ("precision", setup.precision, CHOICES["train.precision"]),
        ("activation_checkpointing", setup.recompute, CHOICES["activation_checkpointing"]),
    ):
        if value not in options:
            raise ConfigError(f"{name}={value} is not one of {', '.join(options)}{nearest(value, options)}")
    if setup.world_size < 1 or setup.micro_batch < 1:
        raise ConfigError("world size and micro-batch must be at least 1")
    if setup.strategy == "single" and setup.world_size > 1:
        raise ConfigError(f"strategy=single is one process, not {setup.world_size}: take ddp, fsdp or zero3")
    if setup.offload and setup.strategy != "zero3":
        raise ConfigError(f"offload is part of zero3 (ds_configs/zero3_offload.json), not of {setup.strategy}")


def _size(moment: Moment) -> int:
    return sum(moment.activations.values()) + moment.gradients + moment.temporaries + moment.communication


def _settings(setup: Setup) -> dict[str, int]:
    """The sizes, in elements, of the strategy's DeepSpeed configuration."""
    name = "zero3_offload" if setup.offload else setup.strategy
    zero: dict[str, int] = read_ds_config(DS_CONFIGS / f"{name}.json")["zero_optimization"]
    return zero


def sharded_elements(setup: Setup, units: Units) -> int:
    """Elements of the parameters that the fullest rank holds: FSDP cuts rows, ZeRO-3 elements, ZeRO-1/2 the whole."""
    world = setup.world_size
    if setup.strategy in ("single", "ddp"):
        return sum(elements(unit) for unit in units.all)
    if setup.strategy == "fsdp":
        return sum(_rows(unit, world) for unit in units.all)
    if setup.strategy == "zero3":
        return sum(-(-math.prod(shape) // world) for unit in units.all for shape in unit.values())
    return -(-sum(elements(unit) for unit in units.all) // world)


def _rows(unit: Shapes, world: int) -> int:
    return sum(-(-shape[0] // world) * math.prod(shape[1:]) for shape in unit.values())


def _state(setup: Setup, units: Units) -> tuple[dict[str, int], int]:
    """Bytes of parameters, masters, moments and average, on the device and on the host."""
    whole, held = sum(elements(unit) for unit in units.all), sharded_elements(setup, units)
    element = 2 if setup.precision == "bf16" else FLOAT
    kinds = {"moments": 2 * FLOAT * held, "ema": FLOAT * held if setup.ema else 0}
    if setup.strategy in ("single", "ddp", "fsdp"):  # the parameters are the masters
        return {"parameters": FLOAT * held, **kinds}, 0
    kinds |= {"parameters": element * (held if setup.strategy == "zero3" else whole), "masters": FLOAT * held}
    if not setup.offload:
        return kinds, 0
    return {"parameters": element * _persistent(setup, units)}, sum(kinds.values())


def _persistent(setup: Setup, units: Units) -> int:
    """Elements of the parameters that ZeRO-3 never gives away, each below its threshold."""
    threshold = _settings(setup)["stage3_param_persistence_threshold"]
    sizes = [math.prod(shape) for unit in units.all for shape in unit.values()]
    return sum(size for size in sizes if size < threshold)


def _moments(setup: Setup, a: Architecture, units: Units) -> Iterator[Moment]:
    """The candidates for the peak."""
    cast = setup.precision == "bf16" and setup.strategy in ("single", "ddp")
    shape = Shape(a, setup.micro_batch, setup.precision, cast)
    whole_block = block_activations(shape)
    kept = {
        "none": whole_block,
        "selective": selective_activations(shape),
        "full": full_activations(shape),
    }[setup.recompute]
    ends = ends_activations(shape)
    patches = setup.micro_batch * (a.tokens - 1) * a.width * FLOAT
    outputs = shape.stream * (2 if shape.low else 1)  # predictions, and the embeddings where block 0 has its own input
    tables = 2 * a.tokens * a.head_dim * FLOAT if a.rope else 0
    flow = _Flow(setup, units)

    loss = 4 * patches
    if shape.low:  # the gradient, and what is cast of some images; then the gradient on its way through the final norm
        cast_at_a_time = min(setup.micro_batch, IMAGES_AT_A_TIME) * patches // setup.micro_batch
        loss = max(patches // 2 + 3 * cast_at_a_time, shape.stream + 2 * shape.residual)
    yield Moment("loss", _merge(_times(kept, a.depth), ends), flow.gradients(a.depth), loss, flow.at_loss())
    matrix = a.width * a.mlp_width
    # the last matrix's gradient in the dtype of the products; then, where weights are cast, in fp32 beside it
    mlp = max(
        shape.hidden + matrix * shape.element,
        (matrix * (2 + FLOAT) - matrix * 2 if cast else 0),
    )
    base = {"ends": tables + ends.get("cast_weights", 0), "outputs": outputs}
    for index in range(a.depth):
        live = dict(whole_block)
        if a.layer_scale is not None:
            live["branches"] -= shape.residual
        yield Moment(
            f"backward of block {index}'s MLP",
            _merge(_merge(_times(kept, index), live), base),
            flow.gradients(index + 1),
            shape.residual + shape.stream + mlp,
            flow.in_block(index),
        )
        yield Moment(
            f"end of the backward of block {index}",
            _merge(_times(kept, index), base),
            flow.gradients(index),
            shape.residual,
            flow.after_block(index),
        )
    yield Moment("end of the backward pass", {"outputs": outputs}, flow.gradients(-1), 0, flow.at_end())
    yield Moment("optimiser step", {}, flow.gradients(-1), 0, flow.in_step())


class _Flow:
    """Gradients and communication buffers of a strategy through the backward pass, in bytes."""

    def __init__(self, setup: Setup, units: Units) -> None:
        self.setup, self.units = setup, units
        self.name, self.world = setup.strategy, setup.world_size
        self.element = 2 if setup.precision == "bf16" else FLOAT
        self.block = elements(units.block)
        self.whole = sum(elements(unit) for unit in units.all)
        self.held = sharded_elements(setup, units)
        self.zero = _settings(setup) if self.name.startswith("zero") else {}
        # stage 1 in bf16 has an optimiser of its own, which keeps whole gradients
        self.whole_gradients = self.name == "zero1" and setup.precision == "bf16"

    def gradients(self, first: int) -> int:
        """When the gradients of the blocks from `first` are there; -1: and the embedding's."""
        done = self.whole if first < 0 else (self.units.depth - first) * self.block + elements(self.units.rest)
        if self.name == "single":
            return FLOAT * done
        if self.name == "ddp":
            return FLOAT * self.whole  # its buckets
        if self.name == "fsdp":
            return FLOAT * done * self.held // self.whole
        if self.whole_gradients:
            return FLOAT * self.whole + self.element * done
        if self.name == "zero3":
            return 0 if self.setup.offload else FLOAT * self.held  # all of them, always
        return FLOAT * done * self.held // self.whole if done >= self._bucket() or first < 0 else 0

    def _bucket(self) -> int:
        return self.zero["reduce_bucket_size"]

    def _buffers(self) -> int:
        """DeepSpeed's buckets: two where reduction overlaps the backward pass (stages 1 and 2), one in stage 3."""
        if self.name == "zero3":
            return FLOAT * self._bucket()
        if self.name in ("zero1", "zero2") and not self.whole_gradients:
            return 2 * self.element * self._bucket()
        return 0

    def _gathered(self) -> int:
        """ZeRO-3's whole parameters: all within its limit, and those that it fetches ahead."""
        if self.name != "zero3":
            return 0
        ahead = min(self.whole, self.zero["stage3_prefetch_bucket_size"] + self.block)
        return self.element * (min(self.whole, self.zero["stage3_max_live_parameters"]) + ahead)

    def at_loss(self) -> int:
        if self.name == "fsdp":
            return self.element * elements(self.units.rest)
        if self.name == "zero3":
            return self._buffers() + self.element * min(self.whole, self.zero["stage3_max_live_parameters"])
        return 0

    def in_block(self, index: int) -> int:
        if self.name == "fsdp":
            ahead = self.block if index > 0 else elements(self.units.embedding)
            before = FLOAT * (self.block if index < self.units.depth - 1 else elements(self.units.rest))
            return self.element * (self.block + ahead) + before
        return self._buffers() + self._gathered()

    def after_block(self, index: int) -> int:
        if self.name == "fsdp":
            ahead = 2 * self.element * (self.block if index > 0 else elements(self.units.embedding))
            return FLOAT * self.block + ahead
        if self.name == "single":
            return 0
        return self._buffers() + self._gathered()

    def at_end(self) -> int:
        reduced = min(self.whole, self._bucket()) if self.zero else 0
        if self.name == "zero3":
            gathered = self.element * min(self.whole, self.zero["stage3_max_live_parameters"])
            return self._buffers() + gathered + (FLOAT + (self.element if self.element < FLOAT else 0)) * reduced
        if self.whole_gradients:
            return FLOAT * min(self.whole, ZERO1_BUCKET)
        if self.zero:  # the bucket flattened, and in fp32 for the reduction
            cast = (self.element + FLOAT) * reduced if self.element < FLOAT else FLOAT * self.held
            return self._buffers() + cast
        return 0

    def in_step(self) -> int:
        if self.zero and not self.whole_gradients:
            return FLOAT * self.held + (FLOAT * self._bucket() if self.name == "zero3" else 0)
        return 0


def _times(kinds: dict[str, int], count: int) -> dict[str, int]:
    return {kind: count * size for kind, size in kinds.items()}


def _merge(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in one | other}
