"""Which strategy a run uses, and its construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nepa_scale.config import ConfigError
from nepa_scale.sharding.ds_config import DS_CONFIGS, read_ds_config, resolve_ds_config, stage_of
from nepa_scale.sharding.strategy import Grouping, ModuleBuilder, StepSettings, Strategy
from nepa_scale.sharding.torch_strategy import TorchStrategy
from nepa_scale.sharding.world import World
from nepa_scale.sharding.zero_strategy import ZeroStrategy


def choose_strategy(requested: str, ds_config: Path | None, world_size: int) -> tuple[str, dict[str, Any] | None]:
    """The strategy's name and, for ZeRO, its unresolved DeepSpeed configuration.

    `auto` is the JSON's ZeRO stage where one is given, else `single` for one process and `fsdp` for several.
    Raises:
        ConfigError: a request that the JSON or the number of ranks contradicts.
    """
    if ds_config is not None:
        values = read_ds_config(ds_config)
        name = f"zero{stage_of(values)}"
        if requested not in ("auto", name):
            raise ConfigError(f"strategy={requested} contradicts {ds_config}, which is {name}: give one of the two")
        return name, values
    name = requested if requested != "auto" else "single" if world_size == 1 else "fsdp"
    if name == "single" and world_size > 1:
        raise ConfigError(f"strategy=single runs in one process, but {world_size} were started: use ddp, fsdp or zero3")
    if name.startswith("zero"):
        return name, read_ds_config(DS_CONFIGS / f"{name}.json")
    return name, None


def complete_ds_config(
    name: str, ds_values: dict[str, Any] | None, settings: StepSettings, world_size: int
) -> dict[str, Any] | None:
    """The strategy's whole DeepSpeed configuration, where it has one. Raises ConfigError as `resolve_ds_config`."""
    if ds_values is None:
        return None
    return resolve_ds_config(ds_values, f"the DeepSpeed configuration of {name}", settings, world_size)


def build_strategy(
    name: str,
    ds_values: dict[str, Any] | None,
    world: World,
    build: ModuleBuilder,
    grouping: Grouping,
    settings: StepSettings,
) -> Strategy:
    """The strategy, with parameters that are not yet meaningful: write them through `shards`, then `refresh`."""
    config = complete_ds_config(name, ds_values, settings, world.size)
    if config is None:
        return TorchStrategy(name, world, build, grouping, settings)
    return ZeroStrategy(name, world, build, grouping, settings, config)
