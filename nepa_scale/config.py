"""One run, one configuration: dataclasses <- YAML files, the later over the earlier <- `section.key=value` overrides.

Every key has a type and a default here and nowhere else. An unknown key, a value of the wrong type or a value out of
range raises `ConfigError`, whose message names the key, what is wrong and how to mend it; `train.py` and the tools
print that line and exit with status 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EXIT_USAGE = 2


class ConfigError(ValueError):
    """The user's configuration (or arguments, or input files) cannot be used; the message says how to mend it."""


@dataclass
class ModelConfig:
    """The backbone. Defaults are the released ViT-B of NEPA (arXiv 2512.16922)."""

    size: str = "vit_b"
    width: int | None = None  # each of width, depth, heads, mlp_width overrides what `size` says
    depth: int | None = None
    heads: int | None = None
    mlp_width: int | None = None
    patch_size: int = 14
    image_size: int | list[int] = 224  # a square's side, or [height, width]
    mlp: str = "gelu"  # gelu | swiglu
    rope: bool = True
    rope_theta: float = 100.0
    rope_rescale: float = 2.0  # in training, coordinates are scaled by a log-uniform factor in [1/r, r]; 1 turns it off
    qk_norm: str = "plain"  # none | plain (no weight) | affine
    layer_scale: float | None = 1e-5  # null: off
    drop_path: float = 0.0
    init_std: float = 0.02
    base_width: int | None = None  # initialisation and learning rates are those for this width, transferred by muP
    base_depth: int | None = None  # and for this depth; null: the same for all sizes


@dataclass
class MaeConfig:
    """Keys of objective.name=mae (He et al. 2021, arXiv 2111.06377)."""

    hidden: float = 0.75  # share of the patches that the encoder does not see
    width: int | None = None  # of the decoder; null: two thirds of the encoder's, at most 512
    depth: int | None = None  # null: two thirds of the encoder's, at most 8


@dataclass
class JepaConfig:
    """Keys of objective.name=jepa (Assran et al. 2023, arXiv 2301.08243); the teacher averages with ema.decay."""

    width: int | None = None  # of the predictor; null: half of the encoder's, at most 384
    depth: int | None = None  # null: half of the encoder's, at most 12


@dataclass
class ObjectiveConfig:
    """What pretraining optimises. Keys without a section are next_embedding's: the paper's ablations."""

    name: str = "next_embedding"  # next_embedding | mae | jepa: see docs/objectives.md
    mae: MaeConfig = field(default_factory=MaeConfig)
    jepa: JepaConfig = field(default_factory=JepaConfig)
    shift: bool = True
    causal: bool = True
    stop_gradient: bool = True
    mask_ratio: float = 0.0  # share of the patches whose input embedding is replaced by a learned token


@dataclass
class FinetuneConfig:
    """`task=finetune`: a classifier on a pretrained backbone. Defaults are the released recipe of NEPA-B."""

    weights: str | None = None  # run folder or checkpoint of pretraining, or an official folder; null: from scratch
    average: bool | None = None  # start from the moving average of its weights; null: where it is old enough, else raw
    pooling: str = "mean"  # of the patches; or last: the last patch, which under causal attention has seen all
    causal: bool = False  # keep attention causal, as in the starred results
    freeze_patches: bool = True  # weight and bias of the patch embedding stay as they are
    layer_decay: float = 0.65  # 1: all layers alike, and all warm up over the whole warmup
    layer_decay_kind: str = "constant"  # constant (factor from block to block) | linear (from layer_decay to 1)
    head_lr: float = 1e-3  # peak learning rate of the last norm and the classifier, for any batch size
    label_smoothing: float = 0.1


@dataclass
class DataConfig:
    """Where the images come from and how they are read."""

    train: str | None = None  # folder, brace pattern or URL of WebDataset shards
    val: str | None = None
    workers: int = 2  # decoding processes per rank; 0 decodes in the training process
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # area of RandomResizedCrop
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333333333333])
    flip: bool = True
    interpolation: str = "bilinear"  # bilinear | bicubic, both antialiased
    ragged: str = "drop"  # what becomes of an epoch's last, short global batch: drop | pad
    open_shards: int = 16  # remote shards only: how many are shuffled together
    cache: str | None = None  # remote shards only: folder of the local copy; default ~/.cache/nepa_scale/shards
    cache_gigabytes: float = 200.0
    timeout: float = 30.0  # seconds a remote server may stay silent
    retries: int = 5
    max_bad_fraction: float = 0.01  # of the samples read; above it the run stops
    allow_pipe: bool = False  # `pipe:` URLs run a shell command


@dataclass
class AugmentConfig:
    """What fine-tuning does to images beside crop and flip; all of it is timm's, and off unless set."""

    rand_augment: str | None = None  # timm's notation: rand-m9-mstd0.5-inc1
    erase: float = 0.0  # probability that a part of an image becomes noise
    mixup: float = 0.0  # alpha of the Beta distribution of the shares; 0: off
    cutmix: float = 0.0  # likewise
    switch: float = 0.5  # probability of cutmix where both are on
    mix_mode: str = "batch"  # how often a share is drawn: batch (once a step) | pair (for each two images)


@dataclass
class OptimizerConfig:
    """AdamW, and the linear scaling rule lr = base_lr * global_batch_size / 256."""

    base_lr: float = 3e-4
    lr: float | None = None  # the peak learning rate itself; overrides base_lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # what it becomes over the run, by a cosine; null: it stays
    clip: float = 1.0  # largest global gradient norm; 0: no clipping


@dataclass
class ScheduleConfig:
    """Linear warmup, then cosine to `final_lr_fraction` of the peak."""

    warmup_epochs: float = 40.0
    warmup_steps: int | None = None  # overrides warmup_epochs
    final_lr_fraction: float = 0.0


@dataclass
class TrainConfig:
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    global_batch_size: int = 4096
    micro_batch_size: int | None = None  # per rank and forward pass; null: the global batch divided by the ranks
    precision: str = "bf16"  # fp32 | bf16 (fp32 masters, reductions and loss)
    seed: int = 0
    resume: str = "auto"  # auto (newest in the run folder) | none | path of a checkpoint
    log_every: int = 20
    log_samples: bool = False  # write the keys of every step's samples to RUN/samples/
    max_skipped: int = 10  # skipped steps in a row that are too many: loss or gradient not finite, or a spike
    on_bad_steps: str = "stop"  # what then: stop | rewind (to the checkpoint before them, passing over their data)
    spike_factor: float = 0.0  # skip a step whose gradient norm exceeds this many times the recent median; 0: never
    timeout: float = 300.0  # seconds without progress (a micro-batch, a wait for the others) before the run gives up


@dataclass
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always saved. 0: only the last
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # and those of steps that are multiples of this; 0: none
    best: str | None = "auto"  # and the one that the evaluation found best by this metric; auto: by the task's own
    stop_on_failure: bool = False  # a save that fails (disk full) is a warning, unless this is set


@dataclass
class EmaConfig:
    decay: float = 0.9999  # 0: no moving average
    decay_end: float | None = None  # what the decay becomes over the run, linearly; null: it stays


@dataclass
class EvaluateConfig:
    """Quality where data.val is given, before the first step, after the last, and in between: kNN accuracy of the
    features in pretraining, the classifier's accuracy in fine-tuning."""

    every: int = 5000  # steps; 0: only before and after
    bank: int = 50_000  # training samples, evenly spread, among which neighbours are sought
    probe: bool = False  # pretraining: also a linear probe of the last block, and how well predictions tell pixels
    batch_size: int = 64  # per rank
    crop_share: float = 0.875  # timm's crop_pct: the image is resized to int(size / crop_share) and cropped to size
    squash: bool = False  # resize without keeping the aspect (timm's crop_mode squash)


@dataclass
class Config:
    """Everything a run depends on. `resolved` copies of it are saved beside the run and in each checkpoint."""

    task: str = "pretrain"  # pretrain | finetune
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    strategy: str = "auto"  # auto | single | ddp | fsdp | zero1 | zero2 | zero3
    activation_checkpointing: str = "none"  # none | selective | full
    activation_memory_budget: float = 1.0  # with compile=true: below 1 the compiler keeps less, and redoes the rest
    compile: bool | None = None  # torch.compile of each block; null: on GPUs
    tracker: str = "none"  # none | wandb
    output: str = "runs/default"  # the run folder


CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("pretrain", "finetune"),
    "objective.name": ("next_embedding", "mae", "jepa"),
    "model.mlp": ("gelu", "swiglu"),
    "model.qk_norm": ("none", "plain", "affine"),
    "finetune.pooling": ("mean", "last"),
    "finetune.layer_decay_kind": ("constant", "linear"),
    "augment.mix_mode": ("batch", "pair"),
    "data.interpolation": ("bilinear", "bicubic"),
    "data.ragged": ("drop", "pad"),
    "train.precision": ("fp32", "bf16"),
    "train.on_bad_steps": ("stop", "rewind"),
    "strategy": ("auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    "activation_checkpointing": ("none", "selective", "full"),
    "tracker": ("none", "wandb"),
}
# YAML and the command line say true and false where the field has a natural "on" and "off"
SWITCHES: dict[str, dict[bool, Any]] = {
    "model.qk_norm": {True: "plain", False: "none"},
    "model.layer_scale": {True: 1e-5, False: None},
}
RANGES: dict[str, tuple[float, float]] = {  # inclusive
    "objective.mask_ratio": (0.0, 0.99),
    "objective.mae.hidden": (0.01, 0.99),
    "objective.mae.width": (1, float("inf")),
    "objective.mae.depth": (1, float("inf")),
    "objective.jepa.width": (1, float("inf")),
    "objective.jepa.depth": (1, float("inf")),
    "model.patch_size": (1, 1024),
    "model.rope_rescale": (1.0, 100.0),
    "model.base_width": (1, float("inf")),
    "model.base_depth": (1, float("inf")),
    "model.drop_path": (0.0, 0.99),
    "finetune.layer_decay": (0.0, 1.0),
    "finetune.head_lr": (0.0, float("inf")),
    "finetune.label_smoothing": (0.0, 0.99),
    "data.workers": (0, 1024),
    "data.open_shards": (1, 10_000),
    "data.max_bad_fraction": (0.0, 1.0),
    "data.timeout": (0.01, float("inf")),
    "data.retries": (0, 1000),
    "data.cache_gigabytes": (0.001, float("inf")),
    "augment.erase": (0.0, 1.0),
    "augment.mixup": (0.0, float("inf")),
    "augment.cutmix": (0.0, float("inf")),
    "augment.switch": (0.0, 1.0),
    "optimizer.base_lr": (0.0, float("inf")),
    "optimizer.lr": (0.0, float("inf")),
    "optimizer.eps": (0.0, 1.0),
    "optimizer.weight_decay": (0.0, 10.0),
    "optimizer.weight_decay_end": (0.0, 10.0),
    "optimizer.clip": (0.0, float("inf")),
    "schedule.final_lr_fraction": (0.0, 1.0),
    "train.steps": (1, float("inf")),
    "train.global_batch_size": (1, float("inf")),
    "train.micro_batch_size": (1, float("inf")),
    "train.seed": (0, 2**63 - 1),
    "train.log_every": (1, float("inf")),
    "train.max_skipped": (1, float("inf")),
    "train.spike_factor": (0.0, float("inf")),
    "train.timeout": (1.0, float("inf")),
    "checkpoint.every": (0, float("inf")),
    "checkpoint.keep": (1, float("inf")),
    "checkpoint.keep_every": (0, float("inf")),
    "ema.decay": (0.0, 1.0),
    "ema.decay_end": (0.0, 1.0),
    "evaluate.crop_share": (0.01, 1.0),
    "evaluate.every": (0, float("inf")),
    "evaluate.bank": (1, float("inf")),
    "evaluate.batch_size": (1, float("inf")),
    "activation_memory_budget": (0.0, 1.0),
}


def load_config(files: str | Path | Sequence[str | Path] | None, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file or files, each over those before it (None: all defaults), applies `a.b=c` overrides in order,
    and validates.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key, wrong type, or a value out of range.
    """
    config = Config()
    for file in [files] if isinstance(files, str | Path) else files or ():
        _update(config, _read_yaml(Path(file)), where=str(file))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"cannot read the argument '{override}': overrides are written section.key=value")
        _update(config, _nest(key, _parse_scalar(text)), where="the command line")
    _check_ranges(config)
    _check_objective(config)
    return config


def config_from_dict(values: dict[str, Any], where: str) -> Config:
    """The configuration that `to_dict` wrote, read back with the same checks; `where` is named in errors."""
    config = Config()
    _update(config, values, where)
    _check_ranges(config)
    _check_objective(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, lists and scalars, fit for YAML and JSON."""
    return dataclasses.asdict(config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def nearest(word: str, candidates: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the closest candidate, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections and keys, but it holds a {type(values).__name__}")
    return values


def _parse_scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _update(section: Any, values: dict[str, Any], where: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(type(section))
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"unknown key '{name}' in {where}{nearest(name, _all_keys())}")
        current = getattr(section, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"'{name}' in {where} is a section: give its keys, as in {name}.key=value")
            _update(current, value, where, f"{name}.")
        else:
            setattr(section, key, _convert(name, value, hints[key], where))


def _all_keys() -> list[str]:
    return list(flatten(to_dict(Config())))


def _convert(name: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type; YAML reads 1e-3 as a string and 1 as an int, where a float is meant."""
    if isinstance(value, bool) and name in SWITCHES:
        return SWITCHES[name][value]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        accepted, converted = _accept(value, option)
        if accepted:
            if name in CHOICES and converted not in CHOICES[name]:
                raise ConfigError(
                    f"{name}={value} in {where} is not one of {', '.join(CHOICES[name])}"
                    f"{nearest(str(value), CHOICES[name])}"
                )
            return converted
    raise ConfigError(f"{name}={value!r} in {where} is not {' or '.join(_describe(option) for option in options)}")


def _accept(value: Any, option: Any) -> tuple[bool, Any]:
    if option is types.NoneType:
        return value is None, None
    if option is bool or option is str:
        return isinstance(value, option), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return False, None
        try:
            number = float(value)
        except ValueError:
            return False, None
        return number == number, number
    if typing.get_origin(option) is list and isinstance(value, (list, tuple)):
        items = [_accept(item, typing.get_args(option)[0]) for item in value]
        return all(accepted for accepted, _ in items), [item for _, item in items]
    return False, None


def _describe(option: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", types.NoneType: "null"}
    return names.get(option, "a list such as [1, 2]")


def _check_ranges(config: Config) -> None:
    flat = flatten(to_dict(config))
    for name, (low, high) in RANGES.items():
        value = flat[name]
        if value is not None and not low <= value <= high:
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name}={value} must be {bounds}")
    for name in ("data.crop_scale", "data.crop_ratio", "optimizer.betas"):
        pair = flat[name]
        if len(pair) != 2 or (name != "optimizer.betas" and not 0 < pair[0] <= pair[1]):
            raise ConfigError(f"{name}={pair} must be two numbers, the smaller first")
    if config.ema.decay == 0 and config.ema.decay_end is not None:
        raise ConfigError(f"ema.decay_end={config.ema.decay_end:g} needs a moving average: set ema.decay above 0")
    if config.activation_memory_budget < 1 and not (config.compile and config.activation_checkpointing == "none"):
        raise ConfigError(
            f"activation_memory_budget={config.activation_memory_budget:g} is for the compiler to keep to: "
            "set compile=true and activation_checkpointing=none"
        )


def _check_objective(config: Config) -> None:
    chosen, defaults = config.objective.name, flatten(dataclasses.asdict(ObjectiveConfig()))
    for key, value in flatten(dataclasses.asdict(config.objective)).items():
        owner = key.partition(".")[0] if "." in key else "next_embedding"
        if key != "name" and owner != chosen and value != defaults[key]:
            raise ConfigError(
                f"objective.{key}={value} is a key of objective.name={owner}, but the run's is {chosen}: leave it out"
            )
    if config.task == "pretrain" and chosen == "jepa" and config.ema.decay == 0:
        raise ConfigError("objective.name=jepa learns from the run's moving average: set ema.decay, such as 0.996")
