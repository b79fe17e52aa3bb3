"""One module and its optimiser, spread over many processes: single, DDP, FSDP2 and DeepSpeed ZeRO behind `Strategy`."""

from nepa_scale.sharding.build import build_strategy, choose_strategy, complete_ds_config
from nepa_scale.sharding.compilation import choose_compilation
from nepa_scale.sharding.shard import Shard
from nepa_scale.sharding.strategy import ParameterGroup, StepSettings, Strategy
from nepa_scale.sharding.world import World, join_world, leave_world, max_over_ranks, mean_over_ranks, numbers_of_ranks

__all__ = [
    "ParameterGroup",
    "Shard",
    "StepSettings",
    "Strategy",
    "World",
    "build_strategy",
    "choose_compilation",
    "choose_strategy",
    "complete_ds_config",
    "join_world",
    "leave_world",
    "max_over_ranks",
    "mean_over_ranks",
    "numbers_of_ranks",
]
