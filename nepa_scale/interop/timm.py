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
from torch import Tensor, nn

from nepa_scale.config import ConfigError, ModelConfig
from nepa_scale.models import SIZES, CausalViT, resolve_architecture
from nepa_scale.models.initialization import initialize_module
from nepa_scale.models.layers import LayerNorm, Linear
from nepa_scale.objectives import Classifier, NextEmbedding, is_causal

_TIMM_SIZES = {"tiny": "vit_ti", "small": "vit_s", "base": "vit_b", "large": "vit_l", "huge": "vit_h", "giant": "vit_g"}
_TIMM_SIZES |= {size.removeprefix("vit_"): size for size in ("vit_1b", "vit_3b", "vit_7b")}
_PATCHES = (14, 16)
_POOLINGS = ("avg", "token", "")


class NepaVisionTransformer(nn.Module):
    """A `CausalViT` with a linear head, and the methods that timm's programs call. B images, T tokens, D width.

    size, patch_size, img_size, mlp, qk_norm, layer_scale, width, depth, heads, mlp_width: as in `ModelConfig`
    num_classes: 0: no head, and no norm before it
    global_pool: "avg": mean of the patches, normalised; "token": the last patch; "": none
    Raises:
        ConfigError: impossible numbers, other than three channels, or an unknown pooling.
    """

    def __init__(
        self,
        size: str = "vit_b",
        patch_size: int = 14,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        global_pool: str = "avg",
        causal: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        qk_norm: str = "affine",
        **model: Any,
    ) -> None:
        super().__init__()
        if in_chans != 3:
            raise ConfigError(f"this backbone takes images of 3 channels, not {in_chans}")
        config = ModelConfig(
            size=size,
            patch_size=patch_size,
            image_size=img_size if isinstance(img_size, int) else list(img_size),
            qk_norm=qk_norm,
            drop_path=drop_path_rate,
            **model,
        )
        self.backbone = CausalViT(resolve_architecture(config))
        initialize_module(self.backbone, self.backbone.architecture, seed=0)
        self.causal = causal
        self.num_features = self.head_hidden_size = self.embed_dim = self.backbone.architecture.width
        self.num_prefix_tokens = 1
        self.global_pool = global_pool
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in _POOLINGS:
            raise ConfigError(f"global_pool={self.global_pool} is not one of avg, token, ''")
        width, device = self.num_features, self.backbone.embedding.weight.device
        self.fc_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            if self.global_pool == "avg":
                self.fc_norm = LayerNorm(width).to(device)
                self.fc_norm.load_state_dict({"weight": torch.ones(width), "bias": torch.zeros(width)})
            self.head = Linear(width, num_classes).to(device)
            nn.init.normal_(self.head.weight, std=self.backbone.architecture.init_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, h, w] -> tokens [B, T, D], CLS first, after the final norm."""
        # without keys there is no drop path: in training they are drawn anew for each call
        keys = torch.randint(2**62, (len(x),), device=x.device) if self.training else None
        return self.backbone(x, causal=self.causal, sample_keys=keys)[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits [B, C], or the pooled features [B, D] before them."""
        if self.global_pool == "avg":
            x = self.fc_norm(x[:, 1:].mean(1))
        elif self.global_pool == "token":
            x = x[:, -1]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,  # noqa: ARG002  (features are always normalised)
        stop_early: bool = False,  # noqa: ARG002
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps [B, D, H, W] (or tokens, "NLC") of some blocks, as timm's feature extraction asks for them."""
        depth = self.backbone.architecture.depth
        count = depth if indices is None else indices
        blocks = list(range(depth - count, depth)) if isinstance(count, int) else [i % depth for i in count]
        wanted = sorted({*blocks, depth - 1})
        states = dict(zip(wanted, self.backbone.hidden_states(x, wanted, causal=self.causal), strict=True))
        grid = (
            x.shape[2] // self.backbone.architecture.patch_size,
            x.shape[3] // self.backbone.architecture.patch_size,
        )
        maps: list[Any] = []
        for block in blocks:
            patches = states[block][:, 1:]
            shaped = patches.transpose(1, 2).unflatten(2, grid) if output_fmt == "NCHW" else patches
            maps.append((shaped, states[block][:, :1]) if return_prefix_tokens else shaped)
        return maps if intermediates_only else (states[depth - 1], maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,  # noqa: ARG002
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the head where only features are wanted; the blocks stay, as the last carries the final norm."""
        if prune_head:
            self.reset_classifier(0, "")
        depth = self.backbone.architecture.depth
        return list(range(depth - indices, depth)) if isinstance(indices, int) else [i % depth for i in indices]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        a = self.backbone.architecture
        return [
            {"module": f"backbone.blocks.{n}", "num_chs": a.width, "reduction": a.patch_size} for n in range(a.depth)
        ]

    def no_weight_decay(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """For timm's layer decay."""
        return {
            "stem": r"^backbone\.embedding",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r"^backbone\.norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ConfigError("gradient checkpointing is there in nepa_scale/train.py, not in timm's programs")


def _cfg() -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.875,
        "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "license": "apache-2.0",
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


def save_timm(task: NextEmbedding | Classifier, folder: Path) -> None:
    """Writes `task`, whole and unsharded, as a folder for `timm.create_model("local-dir:FOLDER")`.

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
        "pretrained_cfg": _cfg() | {"num_classes": classes, "input_size": [3, *a.image_size]},
    }
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
default_cfgs = generate_default_cfgs({model_name(*variant): _cfg() for variant in _VARIANTS})  # where timm looks
for _variant in _VARIANTS:
    _register(*_variant)
