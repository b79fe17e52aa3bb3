"""From a DeepSpeed JSON and the run's configuration to the dictionary that the engine gets.

The run configuration is the only source of batch sizes, precision and clipping: the JSON says "auto" for them or
leaves them out. A number there that contradicts the run is an error, never a silent winner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nepa_scale.config import ConfigError
from nepa_scale.sharding.strategy import StepSettings

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
_OURS = {  # sections whose job the run configuration does
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "train.precision (fp32 or bf16)",
    "amp": "train.precision (fp32 or bf16)",
    "torch_autocast": "train.precision (fp32 or bf16)",
    "activation_checkpointing": "activation_checkpointing",
    "wandb": "tracker",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: not readable, not JSON, no ZeRO stage from 1 to 3, or a section that the run configuration owns.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage={stage} must be 1, 2 or 3")
    for section, key in _OURS.items():
        if section in values:
            raise ConfigError(f"{path} has a section '{section}': remove it, and set {key} in the run configuration")
    return values


def stage_of(values: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration that `read_ds_config` accepted."""
    return int(values["zero_optimization"]["stage"])


def resolve_ds_config(values: dict[str, Any], where: str, settings: StepSettings, world_size: int) -> dict[str, Any]:
    """`values` with every "auto" (or absent) setting that the run owns filled in.

    Raises:
        ConfigError: a value that contradicts the run configuration; both are named.
    """
    bf16 = settings.precision == "bf16"
    owned: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (settings.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (settings.accumulation, "train.global_batch_size and train.micro_batch_size"),
        "train_batch_size": (
            settings.micro_batch_size * settings.accumulation * world_size,
            "train.global_batch_size",
        ),
        "gradient_clipping": (settings.clip, "optimizer.clip"),
    }
    resolved = dict(values)
    for key, (value, ours) in owned.items():
        _claim(resolved, key, value, ours, where)
    resolved["bf16"] = dict(values.get("bf16", {}))
    _claim(resolved["bf16"], "enabled", bf16, "train.precision", where, section="bf16.")
    # gradients are reduced and accumulated in fp32 whatever they were computed in
    resolved.setdefault("communication_data_type", "fp32")
    if bf16:
        resolved.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    # ours is torch's AdamW, on the host too where the state is offloaded
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed's linear keeps gathered weights from outliving the forward pass. Recomputation drops them anyway, and
    # selective recomputation goes wrong with it: it adds the bias in place to a product that was kept
    resolved["zero_optimization"] = {"memory_efficient_linear": settings.recompute == "none" and not settings.compile}
    resolved["zero_optimization"] |= values["zero_optimization"]
    resolved.setdefault("steps_per_print", 2**31 - 1)
    return resolved


def _claim(values: dict[str, Any], key: str, value: Any, ours: str, where: str, section: str = "") -> None:
    given = values.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(
            f"{where} says {section}{key}={given}, the run configuration makes it {value} ({ours}): "
            f'write "auto" there, or change {ours}'
        )
    values[key] = value
