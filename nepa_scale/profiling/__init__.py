"""FLOPs, memory, throughput and plans: what a model costs before anyone pays for it."""

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import Architecture
from nepa_scale.profiling.devices import peak_flops
from nepa_scale.profiling.flops import FlopCount, count_flops, forward_flops, train_flops
from nepa_scale.profiling.memory import Memory, predict_memory
from nepa_scale.training.metrics import Costs


def training_costs(architecture: Architecture, peak: float | None, objective: ObjectiveConfig | None = None) -> Costs:
    """What the loop needs to turn images into FLOPs and MFU; None: next_embedding, or fine-tuning."""
    return Costs(float(train_flops(architecture, objective)), architecture.tokens, peak)


__all__ = [
    "Costs",
    "FlopCount",
    "Memory",
    "count_flops",
    "forward_flops",
    "peak_flops",
    "predict_memory",
    "train_flops",
    "training_costs",
]
