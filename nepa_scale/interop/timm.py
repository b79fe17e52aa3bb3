"""The backbone in timm's registry: import this module, then `timm.create_model("nepa_vit_base_patch14_224", ...)`.

Every size of `nepa_scale.models.SIZES` is registered with patches of 14 and of 16. Attention is bidirectional, as in
fine-tuning; `causal=True` keeps it causal. Weights go there by `save_timm` (`tools/export.py --to timm`), which writes
a folder that `timm.create_model("local-dir:FOLDER")` loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from nepa_scale.config import ConfigError
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.interop.timm_model import NepaVisionTransformer
from nepa_scale.models import SIZES
from nepa_scale.objectives import Classifier, NextEmbedding, is_causal

_TIMM_SIZES = {"tiny": "vit_ti", "small": "vit_s", "base": "vit_b", "large": "vit_l", "huge": "vit_h", "giant": "vit_g"}
_TIMM_SIZES |= {size.removeprefix("vit_"): size for size in ("vit_1b", "vit_3b", "vit_7b")}
_PATCHES = (14, 16)


def _cfg(preprocessing: Preprocessing) -> dict[str, Any]:
    return preprocessing.for_timm() | {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "license": "apache-2.0",
        "first_conv": "backbone.embedding", "classifier": "head",
    }  # fmt: skip


def model_name(size: str, patch_size: int) -> str:
    """timm's name of a size."""
    short = next(short for short, ours in _TIMM_SIZES.items() if ours == size)
    return f"nepa_vit_{short}_patch{patch_size}_224"


def _register(size: str, patch_size: int) -> None:
    name = model_name(size, patch_size)

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        options |= {"size": size} | {"patch_size": options.get("patch_size", patch_size)}
        features = {"out_indices": 3, "feature_cls": "getter"}
        return build_model_with_cfg(NepaVisionTransformer, name, pretrained, feature_cfg=features, **options)

    create.__name__, create.__module__ = name, __name__
    register_model(create)


def save_timm(
    task: NextEmbedding | Classifier,
    folder: Path,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes `task`, whole and unsharded, as a folder for `timm.create_model("local-dir:FOLDER")`.

    preprocessing: with which its quality was measured; what timm's `create_transform` then does
    class_names: of a classifier, in the order of the labels
    Raises:
        ConfigError: the module has a mask token, for which timm has no place, or the folder cannot be written.
    """
    a = task.backbone.architecture
    if a.mask_token:
        raise ConfigError("a model that was pretrained with masking has a mask token, for which timm has no place")
    size = next((s for s, z in SIZES.items() if (z.width, z.depth, z.heads) == (a.width, a.depth, a.heads)), "vit_b")
    arguments = {
        "img_size": list(a.image_size), "patch_size": a.patch_size, "width": a.width, "depth": a.depth,
        "heads": a.heads, "mlp_width": a.mlp_width, "mlp": "swiglu" if a.gated else "gelu", "rope": a.rope,
        "rope_theta": a.rope_theta, "qk_norm": a.qk_norm, "layer_scale": a.layer_scale,
        "causal": task.causal if isinstance(task, Classifier) else is_causal(task.objective),
    }  # fmt: skip
    pooling, classes = "avg", 0
    if isinstance(task, Classifier):
        pooling, classes = "token" if task.fc_norm is None else "avg", task.head.out_features
    patch = a.patch_size if a.patch_size in _PATCHES else _PATCHES[0]
    config = {
        "architecture": model_name(size, patch),
        "num_classes": classes,
        "num_features": a.width,
        "global_pool": pooling,
        "model_args": arguments | {"global_pool": pooling},
        "pretrained_cfg": _cfg(preprocessing) | {"num_classes": classes, "input_size": [3, *a.image_size]},
    }
    if classes and class_names is not None:
        config["label_names"] = list(class_names)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in task.state_dict().items()
    }
    part = folder / ".model.safetensors.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the weights to {folder}: {error.strerror}") from error


_VARIANTS = [(size, patch_size) for size in _TIMM_SIZES.values() for patch_size in _PATCHES]
_DEFAULT = _cfg(Preprocessing(interpolation="bicubic"))
default_cfgs = generate_default_cfgs({model_name(*variant): _DEFAULT for variant in _VARIANTS})  # where timm looks
for _variant in _VARIANTS:
    _register(*_variant)
