"""The run configuration is the only source of batch sizes, precision and clipping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nepa_scale.config import ConfigError
from nepa_scale.sharding import StepSettings, choose_strategy
from nepa_scale.sharding.ds_config import DS_CONFIGS, read_ds_config, resolve_ds_config

SETTINGS = StepSettings("bf16", 4, 2, 1.0, (0.9, 0.95), 1e-8, "none", compile=False)


def test_auto_is_filled_in() -> None:
    resolved = resolve_ds_config(read_ds_config(DS_CONFIGS / "zero3.json"), "zero3.json", SETTINGS, world_size=3)
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["bf16"]["enabled"] is True


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_leave_the_run_its_own(path: Path) -> None:
    values = read_ds_config(path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert values[key] == "auto"
    assert values["gradient_clipping"] == "auto"  # DeepSpeed clips at 1.0 where it is absent


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train_batch_size": 32}, ["train_batch_size=32", "24"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "1.0", "optimizer.clip"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled=False", "True", "train.precision"]),
    ],
)
def test_a_contradiction_names_both_values(change: dict[str, Any], named: list[str]) -> None:
    values = read_ds_config(DS_CONFIGS / "zero2.json") | change
    with pytest.raises(ConfigError) as error:
        resolve_ds_config(values, "zero2.json", SETTINGS, world_size=3)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        (json.dumps({"zero_optimization": {"stage": 4}}), "stage=4"),
        (json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {}}), "'optimizer'"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_ds_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_ds_config(tmp_path / "absent.json")


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text((DS_CONFIGS / "zero3.json").read_text(), encoding="utf-8-sig")
    assert read_ds_config(path) == read_ds_config(DS_CONFIGS / "zero3.json")


def test_choice_of_strategy() -> None:
    assert choose_strategy("auto", None, 1)[0] == "single"
    assert choose_strategy("auto", None, 2)[0] == "fsdp"
    assert choose_strategy("auto", DS_CONFIGS / "zero2.json", 2)[0] == "zero2"
    with pytest.raises(ConfigError, match="contradicts"):
        choose_strategy("fsdp", DS_CONFIGS / "zero2.json", 2)
    with pytest.raises(ConfigError, match="one process"):
        choose_strategy("single", None, 2)
