"""Weights in the official NEPA layout, both ways: a folder with `config.json` and `model.safetensors` (fp32), which
large models split into shards with an index. Its trainer leaves the moving average beside them, in a pickle that is
read as nothing but tensors. `preprocessor_config.json` says how images are prepared.

The official code keeps queries, keys and values apart; here they are one projection, so three of its tensors are one
of ours. Everything else is a renaming, spelled out once in `official_names` and once in `_RENAMED` for both directions.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig, config_from_dict
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.models import Architecture, CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier, NextEmbedding, is_causal

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
SHARDS, AVERAGE = "model.safetensors.index.json", "pytorch_model_ema.bin"
PREFIX = "vit_nepa."
PRETRAINING, CLASSIFICATION = "ViTNepaForPreTraining", "ViTNepaForImageClassification"
_MASK_TOKEN = "embeddings.mask_token"  # a place of the official layout that its released weights leave empty

_RENAMED = {  # field of config.json -> field of `ModelConfig` and `Architecture` with the same value
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "patch_size": "patch_size",
    "rope_theta": "rope_theta",
    "layerscale_value": "layer_scale",
    "drop_path_prob": "drop_path",
    "initializer_range": "init_std",
}
_FIXED: dict[str, Any] = {  # fields that describe what this backbone always does
    "num_channels": 3,
    "qkv_bias": True,
    "layer_norm_eps": 1e-12,
}
_DEFAULTS: dict[str, Any] = _FIXED | {  # what the official code takes for a field that is absent
    "hidden_act": "gelu",
    "use_gated_mlp": False,
    "qk_norm": False,
    "qk_norm_affine": False,
    "qk_norm_bias": False,
    "layerscale_value": 1e-5,
    "rope_theta": 100.0,
    "initializer_range": 0.02,
    "drop_path_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "is_causal": True,
    "add_pooling_layer": False,
    "pos_embed_rescale": 2.0,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
}
_AVERAGE_KEYS = ("state_dict", "model", "ema", "shadow")  # under which trainers keep an average's tensors
_SWITCHES = ("use_gated_mlp", "qk_norm", "qk_norm_affine", "qk_norm_bias", "is_causal", "add_pooling_layer")
_DECIDED_BY = {  # part of a tensor's name -> the fields that say whether there is such a tensor
    ".q_norm.": ("qk_norm", "qk_norm_affine", "qk_norm_bias"),
    ".k_norm.": ("qk_norm", "qk_norm_affine", "qk_norm_bias"),
    ".lambda1": ("layerscale_value",),
    ".gate_proj.": ("use_gated_mlp", "hidden_act"),
    ".layer.": ("num_hidden_layers",),
    "fc_norm.": ("architectures", "add_pooling_layer"),
    "classifier.": ("architectures",),
}


class OfficialModel(nn.Module):
    """A task built from an official folder, with that folder's `config.json` kept as it was, and its
    `preprocessor_config.json`, if it has one.

    The output has attributes: `loss`, `predictions` and `embeddings` [B, T, D] of a pretraining model; `logits` [B, C]
    of a classifier, and `loss` where labels are given. Keywords are those of the task's own `forward`.
    """

    def __init__(
        self, task: NextEmbedding | Classifier, config: dict[str, Any], preprocessor: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.task = task
        self.config = config
        self.preprocessor = preprocessor

    @property
    def class_names(self) -> list[str] | None:
        """By label; None of a pretraining model, and where `id2label` only numbers them."""
        labels = self.config.get("id2label")
        if not isinstance(self.task, Classifier) or not isinstance(labels, dict):
            return None
        names = [str(labels.get(str(index), "")) for index in range(len(labels))]
        return None if names == _numbered(len(names)) or not all(names) else names

    def forward(self, images: Tensor, **inputs: Tensor | None) -> SimpleNamespace:
        """images: normalised, float32 [B, 3, h, w]."""
        return SimpleNamespace(**self.task(images, **inputs))


def load_official(folder: str | Path, weights: str | None = None) -> OfficialModel:
    """The pretraining model or classifier in an official folder, fp32, on the host, in eval mode.

    Dropout and the shift and jitter of positions, which the official code applies in training only, are not built.

    weights: "raw": `model.safetensors`, which the official code reads; "ema": the average that its trainer left beside
        it; None: the first, with a warning where there is the second

    Raises:
        ConfigError: a file is missing or unreadable, `config.json` asks for what this backbone does not do, or it and
            the weights disagree: the field and the tensor are named, and nothing is ever filled in.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if weights is None and has_average(folder):
        warnings.warn(
            f"{folder} also holds a moving average ({AVERAGE}), which is left out: weights='ema' takes it", stacklevel=2
        )
    tensors = _read_average(folder) if weights == "ema" else _read_weights(folder)
    try:
        task = _build_task(config, tensors)
        _fill(task, tensors, config)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    preprocessor = _read_object(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    return OfficialModel(task, config, preprocessor).eval()


def has_average(folder: Path) -> bool:
    """Whether the official trainer left its moving average in the folder."""
    return (folder / AVERAGE).is_file()


def weights_by_default(folder: Path) -> str:
    """Which weights this project's programs take where they are not told: the average, where there is one."""
    return "ema" if has_average(folder) else "raw"


def save_official(
    module: OfficialModel | NextEmbedding | Classifier | CausalViT,
    folder: str | Path,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes `module`, whole and unsharded, as an official folder that its `from_pretrained` and `load_official` read.

    What `load_official` gave is written back bit for bit, with the fields of its `config.json` and its
    `preprocessor_config.json`; a bare backbone is written as a pretraining model. Files of the same name are replaced.

    preprocessing: written as `preprocessor_config.json`
    class_names: of a classifier, in the order of the labels; None: LABEL_0, ...
    Raises:
        ConfigError: the layout has no place for this module, or the folder cannot be written.
    """
    folder = Path(folder)
    task = module.task if isinstance(module, OfficialModel) else module
    if isinstance(task, CausalViT):
        task = NextEmbedding(task, ObjectiveConfig())
    config = official_config(task, class_names)
    preprocessor = preprocessing.for_hugging_face(task.backbone.architecture.image_size) if preprocessing else None
    if isinstance(module, OfficialModel):
        config |= module.config
        preprocessor = preprocessor or module.preprocessor
    config |= {field: "float32" for field in ("dtype", "torch_dtype") if field in config}
    part = folder / f".{WEIGHTS}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_official_tensors(task), part, metadata={"format": "pt"})
        os.replace(part, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if preprocessor is not None:
            (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the official weights to {folder}: {error}") from error


def model_config_from_official(config: dict[str, Any]) -> ModelConfig:
    """Our configuration of the backbone that an official `config.json` describes.

    Raises:
        ConfigError: a field is missing, of the wrong type, or asks for something this backbone does not do.
    """
    fields = _DEFAULTS | config
    missing = [name for name in (*_RENAMED, "image_size") if name not in fields]
    if missing:
        raise ConfigError(f"{CONFIG} lacks {', '.join(missing)}")
    for field, expected in _FIXED.items():
        if fields[field] != expected:
            raise ConfigError(f"{CONFIG}: {field}={fields[field]!r} is not supported, only {expected!r}")
    for field in _SWITCHES:
        if not isinstance(fields[field], bool):
            raise ConfigError(f"{CONFIG}: {field}={fields[field]!r} is not true or false")
    gated = fields["use_gated_mlp"]
    if fields["hidden_act"] != ("silu" if gated else "gelu"):
        raise ConfigError(
            f"{CONFIG}: hidden_act={fields['hidden_act']!r} with use_gated_mlp={gated} is not supported: "
            "an MLP is 'silu' and gated, or 'gelu' and not"
        )
    if fields["qk_norm"] and fields["qk_norm_affine"] and fields["qk_norm_bias"]:
        raise ConfigError(f"{CONFIG}: qk_norm_bias=True is not supported: the norm of queries and keys has no bias")
    model = {ours: fields[field] for field, ours in _RENAMED.items()} | {
        "image_size": fields["image_size"],
        "mlp": "swiglu" if gated else "gelu",
        "qk_norm": "none" if not fields["qk_norm"] else "affine" if fields["qk_norm_affine"] else "plain",
        "rope_rescale": 1.0 if fields["pos_embed_rescale"] is None else fields["pos_embed_rescale"],
    }
    return config_from_dict({"model": model}, CONFIG).model


def official_config(task: NextEmbedding | Classifier, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The `config.json` that describes `task`, every field written out.

    Raises:
        ConfigError: the backbone is one that the official code cannot build, or there are more or fewer names than
            classes.
    """
    architecture = task.backbone.architecture
    height, width = architecture.image_size
    if not architecture.rope:
        raise ConfigError("official weights always have rotary position, but this model has model.rope=false")
    if height != width:
        raise ConfigError(f"official models take square images, but this one has model.image_size=[{height}, {width}]")
    fields = _DEFAULTS | {field: getattr(architecture, ours) for field, ours in _RENAMED.items()}
    fields |= {
        "model_type": "vit_nepa",
        "dtype": "float32",
        "image_size": height,
        "hidden_act": "silu" if architecture.gated else "gelu",
        "use_gated_mlp": architecture.gated,
        "qk_norm": architecture.qk_norm != "none",
        "qk_norm_affine": architecture.qk_norm == "affine",
        "pos_embed_rescale": None if architecture.rope_rescale == 1.0 else architecture.rope_rescale,
    }
    if isinstance(task, NextEmbedding):
        # no pooling is ever done in pretraining, but this is what the released folders say
        return fields | {
            "architectures": [PRETRAINING],
            "is_causal": is_causal(task.objective),
            "add_pooling_layer": True,
        }
    classes = task.head.out_features
    labels = _numbered(classes) if class_names is None else list(class_names)
    if len(labels) != classes:
        raise ConfigError(f"there are {len(labels)} class names for {classes} classes")
    return fields | {
        "architectures": [CLASSIFICATION],
        "is_causal": task.causal,
        "add_pooling_layer": task.fc_norm is not None,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _numbered(classes: int) -> list[str]:
    """The names of classes that nobody named."""
    return [f"LABEL_{index}" for index in range(classes)]


def timm_architecture(folder: Path) -> str | None:
    """What timm calls the model, where the folder is in its layout and not in the official one; else None."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "architecture" not in config or "model_type" in config:
        return None
    return str(config["architecture"])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if (architecture := timm_architecture(folder)) is not None:
        raise ConfigError(
            f"{folder} holds weights for timm ({architecture}), not in the official layout: timm.create_model("
            f"'local-dir:{folder}', pretrained=True) loads them; give their run, or export it with --to official"
        )
    config = _read_object(path)
    if config.get("model_type", "vit_nepa") != "vit_nepa":
        raise ConfigError(f"{path} describes a {config['model_type']}, not a vit_nepa")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; an official folder holds {CONFIG} and {WEIGHTS}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold an object, but it holds a {type(fields).__name__}")
    return fields


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if path.is_file():
        return _read_safetensors(path)
    if (folder / SHARDS).is_file():
        return _read_shards(folder)
    raise ConfigError(f"{path} is missing, and so is {SHARDS}; weights in other formats are not read")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """What the index lists, from the shard of which it says so."""
    index = folder / SHARDS
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index} has no weight_map")
    files = sorted({str(file) for file in places.values()})
    for file in files:
        if Path(file).name != file:
            raise ConfigError(f"{index} names {file}, which is not a file beside it")
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} is missing, which {SHARDS} names")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_safetensors(folder / file)
        wanted = {name for name, place in places.items() if place == file}
        if wanted != found.keys():
            name = min(wanted ^ found.keys())
            raise ConfigError(f"{folder / file} and {SHARDS} disagree about {name}")
        tensors |= found
    return tensors


def _read_average(folder: Path) -> dict[str, Tensor]:
    """Tensors by official name; the wrapper that some trainers save around them is taken off."""
    path = folder / AVERAGE
    if not path.is_file():
        raise ConfigError(f"{path} is missing: this folder has no moving average, only raw weights")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is not a readable file of tensors: {why}") from error
    if isinstance(held, dict) and len(inner := [held[key] for key in _AVERAGE_KEYS if key in held]) == 1:
        held = inner[0]
    if not isinstance(held, dict) or not held or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ConfigError(f"{path} does not hold tensors by name")
    return {
        str(name).removeprefix("module."): tensor.contiguous() for name, tensor in held.items() if name != "n_averaged"
    }


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {' '.join(str(error).split())}") from error


def _build_task(config: dict[str, Any], tensors: dict[str, Tensor]) -> NextEmbedding | Classifier:
    """The task that `config` describes, its parameters not yet filled."""
    fields = _DEFAULTS | config
    mask_token = PREFIX + _MASK_TOKEN in tensors
    backbone = CausalViT(resolve_architecture(model_config_from_official(config), mask_token))
    if not _classifies(config, tensors):
        return NextEmbedding(backbone, ObjectiveConfig(causal=fields["is_causal"]))
    classes = _class_count(config, tensors)
    pooling = "mean" if fields["add_pooling_layer"] else "last"
    return Classifier(backbone, classes, pooling=pooling, causal=fields["is_causal"])


def _classifies(config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """By `architectures`; where that is absent, by the weights."""
    names = config.get("architectures") or [CLASSIFICATION if "classifier.weight" in tensors else PRETRAINING]
    if names not in ([PRETRAINING], [CLASSIFICATION]):
        raise ConfigError(f"{CONFIG}: architectures={names} is not supported, only {PRETRAINING} or {CLASSIFICATION}")
    return bool(names == [CLASSIFICATION])


def _class_count(config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    if "classifier.weight" not in tensors:
        raise ConfigError(f"the weights lack classifier.weight, but {CONFIG} says {_reason('classifier.', config)}")
    rows = tensors["classifier.weight"].shape[0]
    labels = config.get("id2label")
    named = len(labels) if isinstance(labels, dict) else config.get("num_labels", rows)
    if named != rows:
        raise ConfigError(f"classifier.weight has {rows} classes, but {CONFIG} names {named}")
    return rows


def official_names(task: NextEmbedding | Classifier) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our name, official names) of every parameter; several official ones are stacked."""
    for ours, official in _backbone_names(task.backbone.architecture):
        yield f"backbone.{ours}", tuple(PREFIX + name for name in official)
    if isinstance(task, Classifier):
        for kind in ("weight", "bias"):
            yield f"head.{kind}", (f"classifier.{kind}",)
            if task.fc_norm is not None:
                yield f"fc_norm.{kind}", (f"fc_norm.{kind}",)


def _backbone_names(architecture: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "embedding.cls_token", ("embeddings.cls_token",)
    if architecture.mask_token:
        yield "mask_token.weight", (_MASK_TOKEN,)
    for kind in ("weight", "bias"):
        yield f"embedding.{kind}", (f"embeddings.patch_embeddings.projection.{kind}",)
        yield f"norm.{kind}", (f"layernorm.{kind}",)
    for n in range(architecture.depth):
        ours, official = f"blocks.{n}.", f"encoder.layer.{n}."
        inner = f"{official}attention.attention."
        for kind in ("weight", "bias"):
            yield f"{ours}attention.qkv.{kind}", tuple(f"{inner}{part}.{kind}" for part in ("query", "key", "value"))
            yield f"{ours}attention.out.{kind}", (f"{official}attention.output.dense.{kind}",)
            yield f"{ours}attention_norm.{kind}", (f"{official}layernorm_before.{kind}",)
            yield f"{ours}mlp_norm.{kind}", (f"{official}layernorm_after.{kind}",)
            yield f"{ours}mlp.up.{kind}", (f"{official}intermediate.up_proj.{kind}",)
            yield f"{ours}mlp.down.{kind}", (f"{official}output.dense.{kind}",)
            if architecture.gated:
                yield f"{ours}mlp.gate.{kind}", (f"{official}intermediate.gate_proj.{kind}",)
        if architecture.qk_norm == "affine":
            yield f"{ours}attention.query_norm.weight", (f"{inner}q_norm.weight",)
            yield f"{ours}attention.key_norm.weight", (f"{inner}k_norm.weight",)
        if architecture.layer_scale is not None:
            yield f"{ours}attention_scale", (f"{official}layer_scale.lambda1",)
            yield f"{ours}mlp_scale", (f"{official}output.layer_scale.lambda1",)


@torch.no_grad()
def _fill(task: NextEmbedding | Classifier, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Copies every tensor to its parameter; each of both is used exactly once, or a ConfigError names it."""
    parameters = dict(task.named_parameters())
    places = dict(official_names(task))
    wanted = [name for names in places.values() for name in names]
    missing, left_over = set(wanted) - tensors.keys(), tensors.keys() - set(wanted)
    if missing:
        name = min(missing)
        raise ConfigError(f"the weights lack {name}, but {CONFIG} says {_reason(name, config)}")
    if left_over:
        name = min(left_over)
        raise ConfigError(f"the weights hold {name}, but {CONFIG} says {_reason(name, config)}")
    for ours, names in places.items():
        parameter = parameters.pop(ours)
        parts = parameter.chunk(len(names))
        for name, part in zip(names, parts, strict=True):
            if tensors[name].shape != part.shape:
                raise ConfigError(f"{name} is {list(tensors[name].shape)}, but {CONFIG} asks for {list(part.shape)}")
            part.copy_(tensors[name])
    assert not parameters, f"parameters without an official name: {list(parameters)}"


def _official_tensors(task: NextEmbedding | Classifier) -> dict[str, Tensor]:
    """Float32, on the host."""
    parameters = dict(task.named_parameters())
    tensors: dict[str, Tensor] = {}
    for ours, names in official_names(task):
        parts = parameters[ours].detach().to("cpu", torch.float32).chunk(len(names))
        tensors |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    return tensors


def _reason(name: str, config: dict[str, Any]) -> str:
    """The fields that decide whether there is a tensor `name`, with their values."""
    fields = next((fields for part, fields in _DECIDED_BY.items() if part in name), ("architectures",))
    values = _DEFAULTS | config
    return ", ".join(f"{field}={values.get(field)!r}" for field in fields)
