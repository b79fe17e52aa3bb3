"""Configuration: precedence, types, and one clear line for whatever cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nepa_scale.config import CHOICES, RANGES, Config, ConfigError, config_from_dict, flatten, load_config, to_dict


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# precedence


def test_defaults_without_a_file() -> None:
    assert load_config(None) == Config()


def test_a_file_beats_the_defaults_and_an_override_beats_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "task: finetune\nmodel: {size: vit_s, depth: 6}\ntrain:\n  seed: 5\n")
    config = load_config(path, ["model.depth=8", "train.steps=3"])
    assert (config.task, config.model.size, config.model.depth) == ("finetune", "vit_s", 8)
    assert (config.train.seed, config.train.steps) == (5, 3)
    assert config.model.patch_size == Config().model.patch_size
    assert load_config(path).model.depth == 6


def test_the_last_override_wins() -> None:
    assert load_config(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_configurations_share_no_lists() -> None:
    load_config(None, ["model.image_size=[1, 2]"]).data.crop_scale.append(3.0)
    assert Config().data.crop_scale == [0.08, 1.0]


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == Config()


# types


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),  # a string to YAML, which wants a dot and a sign
        ("optimizer.lr=1.5E-4", 1.5e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=null", None),
        ("optimizer.betas=[0.9, 1e-1]", [0.9, 0.1]),
        ("optimizer.betas=[0, 1]", [0.0, 1.0]),
        ("model.image_size=64", 64),
        ("model.image_size=[64, 96]", [64, 96]),
        ("model.qk_norm=true", "plain"),
        ("model.qk_norm=false", "none"),
        ("model.qk_norm=affine", "affine"),
        ("model.layer_scale=true", 1e-5),
        ("model.layer_scale=false", None),
        ("model.layer_scale=0.1", 0.1),
        ("model.rope=no", False),
        ("objective.shift=false", False),
        ("data.train=/data/shard-{000..127}.tar", "/data/shard-{000..127}.tar"),
        ("data.train=pipe:cat a=b.tar", "pipe:cat a=b.tar"),
        ("train.micro_batch_size=null", None),
        ("output=runs/one", "runs/one"),
    ],
)
def test_values_become_the_type_of_their_field(override: str, value: Any) -> None:
    key = override.partition("=")[0]
    converted = flatten(to_dict(load_config(None, [override])))[key]
    assert converted == value
    assert type(converted) is type(value)


def test_a_file_reads_numbers_as_the_command_line_does(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "optimizer: {base_lr: 1e-3, betas: [0.9, 95e-2]}\nmodel: {layer_scale: off}\n")
    )
    assert (config.optimizer.base_lr, config.optimizer.betas, config.model.layer_scale) == (1e-3, [0.9, 0.95], None)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=1.5", ["train.steps=1.5", "a whole number or null"]),
        ("train.seed=true", ["train.seed=True", "a whole number"]),
        ("train.seed=null", ["train.seed=None", "a whole number"]),
        ("optimizer.base_lr=fast", ["optimizer.base_lr='fast'", "a number"]),
        ("optimizer.base_lr=nan", ["optimizer.base_lr='nan'", "a number"]),
        ("optimizer.betas=0.9", ["optimizer.betas=0.9", "a list"]),
        ("optimizer.betas=[0.9, x]", ["optimizer.betas", "a list"]),
        ("data.flip=1", ["data.flip=1", "true or false"]),
        ("model.rope=maybe", ["model.rope='maybe'", "true or false"]),
        ("output=3", ["output=3", "a word"]),
        ("model.image_size=big", ["model.image_size='big'", "a whole number or a list"]),
        ("model=vit_b", ["'model'", "section", "model.key=value"]),
        ("model.mlp.width=3", ["model.mlp"]),
        ("model.mlp=swish", ["model.mlp=swish", "gelu, swiglu", "did you mean 'swiglu'?"]),
        ("strategy=zero4", ["strategy=zero4", "zero3"]),
        ("task=train", ["task=train", "pretrain, finetune"]),
    ],
)
def test_values_of_the_wrong_kind(override: str, parts: list[str]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message


# keys


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "model.pach_size=14",
            ["unknown key 'model.pach_size'", "the command line", "did you mean 'model.patch_size'?"],
        ),
        ("patch_size=14", ["unknown key 'patch_size'", "did you mean 'model.patch_size'?"]),
        ("train.global_batch=64", ["did you mean 'train.global_batch_size'?"]),
        ("optimiser.lr=1", ["unknown key 'optimiser'"]),
        ("zzz=1", ["unknown key 'zzz' in the command line"]),
        ("train.seed", ["cannot read the argument 'train.seed'", "section.key=value"]),
        ("=3", ["section.key=value"]),
    ],
)
def test_keys_that_do_not_exist(override: str, parts: list[str]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message
    if override.startswith("zzz"):
        assert "did you mean" not in message


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "ema: {decai: 0.9}\n")
    message = refused(path=path)
    assert f"unknown key 'ema.decai' in {path}" in message
    assert "did you mean 'ema.decay'?" in message


# ranges


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("objective.mask_ratio=1.5", "objective.mask_ratio=1.5 must be between 0 and 0.99"),
        ("objective.mask_ratio=-0.1", "objective.mask_ratio=-0.1 must be between"),
        ("train.global_batch_size=0", "train.global_batch_size=0 must be at least 1"),
        ("train.seed=-1", "train.seed=-1 must be"),
        ("ema.decay=1.1", "ema.decay=1.1 must be between 0 and 1"),
        ("model.rope_rescale=0.5", "model.rope_rescale=0.5 must be between 1 and 100"),
        ("data.crop_scale=[1.0, 0.1]", "data.crop_scale=[1.0, 0.1] must be two numbers, the smaller first"),
        ("data.crop_scale=[1.0]", "must be two numbers"),
        ("data.crop_ratio=[0, 1]", "data.crop_ratio=[0.0, 1.0]"),
        ("activation_memory_budget=0.5", "set compile=true and activation_checkpointing=none"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be two numbers"),
    ],
)
def test_values_out_of_range(override: str, part: str) -> None:
    assert part in refused(override)


def test_every_range_and_choice_names_a_field_that_its_default_satisfies() -> None:
    flat = flatten(to_dict(Config()))
    for name, (low, high) in RANGES.items():
        assert flat[name] is None or low <= flat[name] <= high, name
    for name, choices in CHOICES.items():
        assert flat[name] in choices, name


# files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert f"cannot read the configuration {missing}" in refused(path=missing)
    assert "cannot read" in refused(path=tmp_path)
    assert "not valid YAML" in refused(path=write(tmp_path, "a: [1, 2\nb: }"))
    assert "must hold sections and keys" in refused(path=write(tmp_path, "- 1\n- 2\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not valid YAML" in refused(path=tmp_path / "binary.yaml")


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    assert "not valid YAML" in refused(path=write(tmp_path, "output: !!python/object/apply:os.getcwd []\n"))


# round trip


def test_what_to_dict_writes_config_from_dict_reads() -> None:
    config = load_config(
        None,
        ["model.size=vit_l", "model.image_size=[28, 56]", "model.layer_scale=false", "optimizer.lr=1e-3",
         "train.steps=10", "strategy=zero3", "data.crop_scale=[0.2, 1]"],
    )  # fmt: skip
    assert config_from_dict(to_dict(config), "a checkpoint") == config
    assert config_from_dict(json.loads(json.dumps(to_dict(config))), "a checkpoint") == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), "a checkpoint") == config


def test_config_from_dict_checks_and_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model\.sizes' in a checkpoint"):
        config_from_dict({"model": {"sizes": "vit_b"}}, "a checkpoint")
    with pytest.raises(ConfigError, match=r"train\.log_every=0 must be at least 1"):
        config_from_dict({"train": {"log_every": 0}}, "a checkpoint")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
