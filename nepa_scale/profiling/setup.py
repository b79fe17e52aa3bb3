"""What determines the memory of a training step, predicted or measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from nepa_scale.config import ModelConfig


@dataclass(frozen=True)
class Setup:
    """One training step: model, sharding, and what a rank's forward pass takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    strategy: str = "ddp"  # single | ddp | fsdp | zero1 | zero2 | zero3
    world_size: int = 1
    micro_batch: int = 8  # images of one rank's forward pass
    precision: str = "bf16"  # fp32 | bf16
    recompute: str = "none"  # none | selective | full
    ema: bool = True
    offload: bool = False  # ZeRO-3's parameters and optimiser state in host memory
