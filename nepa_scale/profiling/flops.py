"""FLOPs of the causal ViT in closed form, checked against three counters by `nepa_scale.profiling.counters`.

Convention: a multiply-add is 2 FLOPs; matrix products, the patch embedding and attention count; element-wise work,
norms and softmax do not. Attention counts in full unless a name says `halved`: then its two products count half, the
work that causal masking leaves (of T tokens, exactly (T + 1) / 2T; a half, as is customary).

Model FLOPs are what the mathematics needs: a forward pass, and a backward pass with two products for each of the
forward pass's (one for the patch embedding: images need no gradient). Hardware FLOPs are what is computed: model FLOPs,
what activation recomputation redoes, and the scores that a fused attention kernel computes again in its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import CHOICES, ConfigError, ModelConfig, ObjectiveConfig, nearest
from nepa_scale.models import Architecture, resolve_architecture, size_name
from nepa_scale.objectives import is_causal
from nepa_scale.profiling.parameters import count_parameters, pretraining_only_parameters
from nepa_scale.profiling.passes import Pass, backbone_forwards, passes_of

PARTS = ("embedding", "qkv", "scores", "out", "mlp")
RECOMPUTE = ("none", "selective", "full")
# element-wise operations of one parameter's update: weight decay 1, first moment 3, second 4, its root, bias correction
# and epsilon 3, the update 3; and for the global norm 2, for clipping 1
ADAMW_OPERATIONS, CLIP_OPERATIONS, EMA_OPERATIONS = 14, 3, 3


def forward_flops(architecture: Architecture, objective: ObjectiveConfig | None = None) -> dict[str, int]:
    """Forward FLOPs of one image by module: `embedding`, and summed over the blocks `qkv`, `scores`, `out`, `mlp`.

    With an objective other than next_embedding those are of the tokens that it lets in, and what it has beside the
    backbone stands as a whole under the name of its pass: `decoder`, or `predictor` and `teacher`.
    """
    return _by_module(architecture, objective, _forward)


def backward_flops(architecture: Architecture, objective: ObjectiveConfig | None = None) -> dict[str, int]:
    """Backward FLOPs of one image by module, without any recomputation."""

    def backward(one: Pass) -> dict[str, int]:
        factors = {"embedding": 1} if one.trained else {}
        return {part: flops * factors.get(part, 2 * one.trained) for part, flops in _forward(one).items()}

    return _by_module(architecture, objective, backward)


def recomputed_flops(
    architecture: Architecture, recompute: str, objective: ObjectiveConfig | None = None
) -> dict[str, int]:
    """FLOPs that activation recomputation adds to one image's backward pass, by module.

    recompute: "none"; "selective" keeps products but those of square weights, as of attention's output; "full" redoes
        the blocks.
        A block is redone up to the last value that its backward pass reads: where nothing multiplies the MLP's
        output (no LayerScale, no drop path) the MLP's last product is not.
    """

    def recomputed(one: Pass) -> dict[str, int]:
        a = one.architecture
        redone = _block_flops(one) if recompute != "none" and one.trained else dict.fromkeys(PARTS[1:], 0)
        if recompute == "selective":
            redone |= {"qkv": 0, "scores": 0} | ({} if a.mlp_width == a.width else {"mlp": 0})
        if redone["mlp"] and a.layer_scale is None:
            dropped = a.depth - 1 if a.drop_path > 0 else 0  # the first block's rate is 0
            redone["mlp"] -= (a.depth - dropped) * 2 * one.sequences * one.tokens * a.width * a.mlp_width
        return {"embedding": 0} | redone

    return _by_module(architecture, objective, recomputed)


def kernel_flops(architecture: Architecture, objective: ObjectiveConfig | None = None) -> dict[str, int]:
    """FLOPs that a fused attention kernel adds to one image's backward pass: the scores again, half of its forward."""

    def again(one: Pass) -> dict[str, int]:
        return dict.fromkeys(PARTS, 0) | {"scores": _block_flops(one)["scores"] // 2 * one.trained}

    return _by_module(architecture, objective, again)


def train_flops(architecture: Architecture, objective: ObjectiveConfig | None = None) -> int:
    """Forward and backward FLOPs of one image, without recomputation: model FLOPs."""
    return sum(forward_flops(architecture, objective).values()) + sum(backward_flops(architecture, objective).values())


def _forward(one: Pass) -> dict[str, int]:
    a = one.architecture
    embedding = 2 * (a.tokens - 1) * 3 * a.patch_size**2 * a.width if one.embeds else 0
    linears = sum(2 * rows * inputs * outputs for rows, inputs, outputs in one.linears)
    return {"embedding": embedding, **_block_flops(one), **({"linears": linears} if linears else {})}


def _block_flops(one: Pass) -> dict[str, int]:
    a, rows = one.architecture, one.sequences * one.tokens
    return {
        "qkv": a.depth * 2 * rows * a.width * 3 * a.width,
        "scores": a.depth * 2 * 2 * rows * one.tokens * a.width,
        "out": a.depth * 2 * rows * a.width * a.width,
        "mlp": a.depth * 2 * rows * a.width * a.mlp_width * (3 if a.gated else 2),
    }


def _by_module(
    architecture: Architecture, objective: ObjectiveConfig | None, count: Callable[[Pass], dict[str, int]]
) -> dict[str, int]:
    backbone, *others = passes_of(architecture, objective)
    return count(backbone) | {one.name: sum(count(one).values()) for one in others}


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one model; of one image unless a name says otherwise. Dictionaries are by module, see `forward_flops`.

    parameters: trained, those that only pretraining has among them
    """

    size: str
    objective: ObjectiveConfig
    architecture: Architecture
    parameters: int
    causal: bool
    recompute: str
    forward: dict[str, int]
    backward: dict[str, int]
    recomputed: dict[str, int]
    kernel: dict[str, int]
    optimizer_per_step: int  # element-wise, over all ranks; not part of model or hardware FLOPs
    images_per_step: int
    images: int | None  # of the whole run

    @property
    def pretraining_only(self) -> int:
        """Parameters that the backbone lacks."""
        return pretraining_only_parameters(self.architecture, self.objective)

    @property
    def backbone_forwards(self) -> int:
        """Of a step."""
        return backbone_forwards(self.architecture, self.objective)

    @property
    def backbone_tokens(self) -> int:
        """That the backbone takes in to be trained."""
        return next(passes_of(self.architecture, self.objective)).tokens

    @property
    def shares(self) -> dict[str, float]:
        """Of the model FLOPs, what each pass beside the backbone's takes."""
        return {
            part: (flops + self.backward[part]) / self.train_flops_per_image
            for part, flops in self.forward.items()
            if part not in PARTS
        }

    @property
    def flops_per_image(self) -> int:
        return sum(self.forward.values())

    @property
    def backward_flops_per_image(self) -> int:
        return sum(self.backward.values())

    @property
    def train_flops_per_image(self) -> int:
        """Model FLOPs: forward and backward. MFU is their rate over the peak."""
        return self.flops_per_image + self.backward_flops_per_image

    @property
    def hardware_flops_per_image(self) -> int:
        """Model FLOPs and all recomputation. HFU is their rate over the peak."""
        return self.train_flops_per_image + sum(self.recomputed.values()) + sum(self.kernel.values())

    def halved(self) -> FlopCount:
        """The same with attention's products halved; itself where attention is not causal."""
        if not self.causal:
            return self
        fields = {
            name: getattr(self, name) | {"scores": getattr(self, name)["scores"] // 2}
            for name in ("forward", "backward", "recomputed", "kernel")
        }
        return FlopCount(**{**self.__dict__, **fields})

    def to_json(self) -> dict[str, Any]:
        """The keys of `tools/flops.py --json`, without the counters."""
        return {
            "size": self.size,
            "objective": self.objective.name,
            "parameters": self.parameters,
            "pretraining_only_parameters": self.pretraining_only,
            "tokens": self.architecture.tokens,
            "backbone_tokens": self.backbone_tokens,
            "backbone_forwards": self.backbone_forwards,
            "shares": self.shares,
            "recompute": self.recompute,
            "causal": self.causal,
            "by_module": self.forward,
            "backward_by_module": self.backward,
            "recomputed_by_module": self.recomputed,
            "attention_kernel_recomputed": sum(self.kernel.values()),
            **self._totals(),
            "causal_halved": self.halved()._totals(),
            "optimizer_flops_per_step": self.optimizer_per_step,
            "images_per_step": self.images_per_step,
            "images": self.images,
        }

    def _totals(self) -> dict[str, int | None]:
        return {
            "flops_per_image": self.flops_per_image,
            "backward_flops_per_image": self.backward_flops_per_image,
            "train_flops_per_image": self.train_flops_per_image,
            "hardware_flops_per_image": self.hardware_flops_per_image,
            "model_flops_per_step": self.images_per_step * self.train_flops_per_image,
            "hardware_flops_per_step": self.images_per_step * self.hardware_flops_per_image,
            "model_flops_of_run": None if self.images is None else self.images * self.train_flops_per_image,
            "hardware_flops_of_run": None if self.images is None else self.images * self.hardware_flops_per_image,
        }


def count_flops(
    size: str = "vit_b",
    patch_size: int = 14,
    image_size: int | tuple[int, int] | list[int] = 224,
    *,
    objective: ObjectiveConfig | None = None,
    causal: bool = True,
    recompute: str = "none",
    global_batch_size: int = 4096,
    images: int | None = None,
    ema: bool = True,
    mask_token: bool = False,
    **model: Any,
) -> FlopCount:
    """FLOPs of pretraining a named size; further keywords are the fields of `ModelConfig`.

    objective: what is pretrained with; None: next_embedding
    causal: whether attention is, as far as the objective's can be; only the halved figures depend on it
    recompute: none | selective | full
    global_batch_size: images of one step
    images: of the whole run (epochs times samples), where its total is wanted

    Raises:
        ConfigError: unknown size, objective or recomputation, or impossible numbers.
    """
    objective = objective or ObjectiveConfig()
    if objective.name not in CHOICES["objective.name"]:
        options = CHOICES["objective.name"]
        raise ConfigError(
            f"objective={objective.name} is not one of {', '.join(options)}{nearest(objective.name, options)}"
        )
    if recompute not in RECOMPUTE:
        raise ConfigError(
            f"activation_checkpointing={recompute} is not one of {', '.join(RECOMPUTE)}{nearest(recompute, RECOMPUTE)}"
        )
    sides = image_size if isinstance(image_size, int) else list(image_size)
    config = ModelConfig(size=size, patch_size=patch_size, image_size=sides, **model)
    architecture = resolve_architecture(config, mask_token)
    parameters = count_parameters(architecture) + pretraining_only_parameters(architecture, objective)
    operations = ADAMW_OPERATIONS + CLIP_OPERATIONS + (EMA_OPERATIONS if ema else 0)
    return FlopCount(
        size=size_name(architecture),
        objective=objective,
        architecture=architecture,
        parameters=parameters,
        causal=causal and is_causal(objective),
        recompute=recompute,
        forward=forward_flops(architecture, objective),
        backward=backward_flops(architecture, objective),
        recomputed=recomputed_flops(architecture, recompute, objective),
        kernel=kernel_flops(architecture, objective),
        optimizer_per_step=operations * parameters,
        images_per_step=global_batch_size,
        images=images,
    )
