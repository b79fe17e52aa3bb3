"""The backbone with the methods that timm's programs call, which mean what they mean for timm's VisionTransformer.

Shapes: B images, T tokens (CLS first), D width, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import is_scriptable, resample_patch_embed
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nepa_scale.config import ConfigError, ModelConfig
from nepa_scale.models import Architecture, CausalViT, initial_values, resolve_architecture
from nepa_scale.models.initialization import initialize_module
from nepa_scale.models.layers import LayerNorm, Linear, drop_path_factors, drop_path_rates

POOLINGS = ("avg", "token", "")
_NO_DROPOUT = "the only regularisation inside these models is drop_path_rate"
_NO_BATCH_NORM = "these models have no batch norm"
_NOT_HERE = {  # arguments that timm's programs pass: taken where they ask for nothing, else refused for this reason
    "drop_rate": _NO_DROPOUT,
    "pos_drop_rate": _NO_DROPOUT,
    "patch_drop_rate": _NO_DROPOUT,
    "proj_drop_rate": _NO_DROPOUT,
    "attn_drop_rate": _NO_DROPOUT,
    "drop_block_rate": _NO_DROPOUT,
    "drop_connect_rate": _NO_DROPOUT,
    "drop_block": _NO_DROPOUT,
    "bn_tf": _NO_BATCH_NORM,
    "bn_momentum": _NO_BATCH_NORM,
    "bn_eps": _NO_BATCH_NORM,
    "dynamic_img_size": "leave it out, as images of any size that divides into patches are taken as they are",
    "dynamic_img_pad": "images are not padded: give them a size that divides into patches",
    "scriptable": "TorchScript cannot compile these models: trace them (torch.jit.trace) or use torch.export",
}


class NepaVisionTransformer(nn.Module):
    """A `CausalViT` with a linear head.

    size, patch_size, img_size, mlp, qk_norm, layer_scale, width, depth, heads, mlp_width: as in `ModelConfig`
    num_classes: 0: no head, and no norm before it
    global_pool: "avg": mean of the patches, normalised; "token": the last patch; "": none
    in_chans: channels of the images
    device, dtype: of the parameters; matrix products are computed in the parameters' dtype, also after `.to(dtype)`
    Raises:
        ConfigError: impossible numbers, an unknown pooling or argument, or one of `_NOT_HERE` that is not 0 or None.
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
        drop_path_rate: float | None = 0.0,
        qk_norm: str = "affine",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = ModelConfig(
            size=size,
            patch_size=patch_size,
            image_size=img_size if isinstance(img_size, int) else list(img_size),
            qk_norm=qk_norm,
            drop_path=drop_path_rate or 0.0,
            **_model_options(options),
        )
        architecture = resolve_architecture(config)
        self.backbone = CausalViT(architecture)
        initialize_module(self.backbone, architecture, seed=0)
        self.causal = causal
        self.num_features = self.head_hidden_size = self.embed_dim = architecture.width
        self.num_prefix_tokens = 1
        self.in_chans = in_chans
        if in_chans != 3:
            self._take_channels(in_chans, architecture)
        self.grad_checkpointing = False
        self._drop_path_rates = drop_path_rates(architecture.drop_path, architecture.depth)
        self.global_pool = global_pool
        self.reset_classifier(num_classes)
        self.to(device=device, dtype=dtype)

    def _take_channels(self, channels: int, architecture: Architecture) -> None:
        if channels < 1:
            raise ConfigError(f"in_chans={channels} is not a number of channels")
        shape = (architecture.width, channels, architecture.patch_size, architecture.patch_size)
        self.backbone.embedding.weight = nn.Parameter(initial_values("embedding.weight", shape, architecture, seed=0))

    def _apply(self, *arguments: Any, **options: Any) -> NepaVisionTransformer:
        """What `.to(dtype)` and its like call: the products follow the parameters."""
        super()._apply(*arguments, **options)
        self.backbone.dtype = self.backbone.embedding.weight.dtype
        return self

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in POOLINGS:
            raise ConfigError(f"global_pool={self.global_pool} is not one of avg, token, ''")
        width, like = self.num_features, self.backbone.embedding.weight
        self.fc_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            if self.global_pool == "avg":
                self.fc_norm = LayerNorm(width).to(like)
                self.fc_norm.load_state_dict({"weight": torch.ones(width), "bias": torch.zeros(width)})
            self.head = Linear(width, num_classes).to(like)
            nn.init.normal_(self.head.weight, std=self.backbone.architecture.init_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Images and patches of another size: the patches' kernel is resampled, and rotary position has no weights.

        Raises:
            ConfigError: patches that are not square, or an image that does not divide into them.
        """
        backbone = self.backbone
        a = backbone.architecture
        sides = a.image_size if img_size is None else _pair(img_size)
        patch = a.patch_size if patch_size is None else _pair(patch_size)[0]
        if patch_size is not None and _pair(patch_size) != (patch, patch):
            raise ConfigError(f"patch_size={list(_pair(patch_size))}: patches are square")
        if patch < 1 or sides[0] % patch or sides[1] % patch or min(sides) < patch:
            raise ConfigError(f"img_size={list(sides)} is not a multiple of patch_size={patch}")
        if patch != a.patch_size:
            weight = resample_patch_embed(backbone.embedding.weight.detach(), [patch, patch])
            backbone.embedding.weight = nn.Parameter(weight, backbone.embedding.weight.requires_grad)
            backbone.embedding.patch_size = patch
        backbone.architecture = dataclasses.replace(a, image_size=sides, patch_size=patch)

    def _states(self, images: Tensor, blocks: int) -> Iterator[Tensor]:
        """The residual stream after each of the first `blocks` blocks, float32 [B, T, D]."""
        backbone = self.backbone
        x, rope = backbone.embedding(images, backbone.dtype).float(), backbone.rotary(images)
        kept: list[Tensor | None] = [None] * blocks
        if self.training and any(self._drop_path_rates):
            keys = torch.randint(2**62, (len(x),), device=x.device)  # drawn anew in each call
            kept = drop_path_factors(keys, self._drop_path_rates)[:blocks]
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing()
        for block, factors in zip(backbone.blocks[:blocks], kept, strict=True):
            inputs = (x, rope, self.causal, backbone.dtype, factors)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            yield x

    def _normalized(self, x: Tensor) -> Tensor:
        """After the final norm, if that was not pruned, in the dtype of the products."""
        norm, dtype = self.backbone.norm, self.backbone.dtype
        return norm(x, dtype) if isinstance(norm, LayerNorm) else x.to(dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, h, w] -> tokens [B, T, D] after the final norm."""
        *_, x = self._states(x, len(self.backbone.blocks))
        return self._normalized(x)

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
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Maps [B, D, H, W] (or tokens, "NLC") of some blocks, from the first on, and the tokens after the last one.

        indices: blocks counted from 0, negative ones from the end; a number n: the last n; None: all
        norm: the maps are taken after the final norm; else they are the residual stream, in the dtype of the products
        stop_early: no block after the last index is run, and the tokens are those after that one
        output_dict: as {"image_features", "image_intermediates", "image_intermediates_prefix"}
        Raises:
            AssertionError: timm's, of an index that is out of range, or another format.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        depth = len(self.backbone.blocks)
        wanted, last = _take(depth, indices)
        grid = tuple(side // self.backbone.architecture.patch_size for side in x.shape[2:])
        taken = []
        for number, x in enumerate(self._states(x, last + 1 if stop_early else depth)):  # noqa: B020
            if number in wanted:
                taken.append(self._normalized(x) if norm else x.to(self.backbone.dtype))
        prefix = [state[:, : self.num_prefix_tokens] for state in taken]
        maps: list[Any] = [state[:, self.num_prefix_tokens :] for state in taken]
        if output_fmt == "NCHW":
            maps = [patches.transpose(1, 2).unflatten(2, grid).contiguous() for patches in maps]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else found | {"image_features": self._normalized(x)}
        if return_prefix_tokens:
            maps = list(zip(maps, prefix, strict=True))
        return maps if intermediates_only else (self._normalized(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks after the last of `indices`, and the final norm and the head where asked; returns them."""
        wanted, last = _take(len(self.backbone.blocks), indices)
        self.backbone.blocks = self.backbone.blocks[: last + 1]
        if prune_norm:
            self.backbone.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        a = self.backbone.architecture
        return [
            {"module": f"backbone.blocks.{n}", "num_chs": a.width, "reduction": a.patch_size}
            for n in range(len(self.backbone.blocks))
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
        """Whether blocks are computed again in the backward pass instead of being kept."""
        self.grad_checkpointing = enable


def _model_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are fields of `ModelConfig`.

    Raises:
        ConfigError: one that is not, or one that this model has no place for.
    """
    if is_scriptable():
        options = options | {"scriptable": True}
    for name, why in _NOT_HERE.items():
        if options.get(name):
            raise ConfigError(f"{name}={options[name]} is not possible: {why}")
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"image_size", "drop_path"}
    taken = {name: value for name, value in options.items() if name not in _NOT_HERE and name != "exportable"}
    unknown = sorted(taken.keys() - fields)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: these models have no such argument; they have {', '.join(sorted(fields))}"
        )
    return taken


def _take(blocks: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The blocks that `indices` name, counted from 0, and the last of them."""
    named = indices if indices is None or isinstance(indices, int) else list(indices)
    taken, last = feature_take_indices(blocks, named)
    return list(taken), last


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
