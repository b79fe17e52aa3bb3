"""Coordinate check of hyperparameter transfer: do activations keep their scale while the model grows?

After a few steps of training at each width (or depth) the root mean square of every block's branches, of the stream and
of the embedding is taken. Where transfer works it does not depend on the size: its slope in a log-log plot is near zero
(2203.03466, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from nepa_scale.models.initialization import initialize_module
from nepa_scale.objectives import NextEmbedding
from nepa_scale.training.pretraining import Pretraining

HEAD = 32  # width of a head, the same at all sizes
IMAGES, SIDE, PATCH = 16, 32, 8
LR = 5e-4


@dataclass(frozen=True)
class CoordinateCheck:
    """scales: root mean square of each activation at each of `sizes`, averaged over the seeds; slopes: of these."""

    along: str  # width | depth
    transferred: bool
    sizes: list[int]
    scales: dict[str, list[float]]
    slopes: dict[str, float]

    @property
    def steepest(self) -> float:
        """The slope that is farthest from 0."""
        return max(self.slopes.values(), key=abs)


def coordinate_check(
    sizes: Sequence[int], *, along: str = "width", transferred: bool = True, steps: int = 10, seeds: int = 2
) -> CoordinateCheck:
    """along: "width" (at depth 3) or "depth" (at width 64); transferred: from the smallest size, else not at all."""
    found: dict[str, list[float]] = {}
    for size in sizes:
        model = ModelConfig(width=64, depth=3, patch_size=PATCH, image_size=SIDE, layer_scale=0.1)
        setattr(model, along, size)
        model.heads = (model.width or 0) // HEAD
        if transferred:
            setattr(model, f"base_{along}", min(sizes))
        runs = [_activations(model, steps, seed) for seed in range(seeds)]
        for name in runs[0]:
            found.setdefault(name, []).append(float(np.mean([run[name] for run in runs])))
    slopes = {name: float(np.polyfit(np.log(sizes), np.log(scales), 1)[0]) for name, scales in found.items()}
    return CoordinateCheck(along, transferred, list(sizes), found, slopes)


def _activations(model: ModelConfig, steps: int, seed: int) -> dict[str, float]:
    """After `steps` of AdamW on one batch of smooth random images, of the first and the last block."""
    config = Config(model=model, objective=ObjectiveConfig(), optimizer=OptimizerConfig(lr=LR))
    config.train.precision = "fp32"
    task = Pretraining(config)
    module = task.build()
    assert isinstance(module, NextEmbedding)
    initialize_module(module, task.architecture, seed)
    parameters = dict(module.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": LR * group.lr_scale,
            "weight_decay": group.weight_decay,
        }
        for group in task.groups(list(parameters))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    images = _images(seed)
    for _ in range(steps):
        module(images)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return _measure(module, images)


@torch.no_grad()
def _measure(module: NextEmbedding, images: Tensor) -> dict[str, float]:
    blocks = module.backbone.blocks
    watched: dict[str, nn.Module] = {"embedding": module.backbone.embedding}
    for label, block in (("first", blocks[0]), ("last", blocks[-1])):
        watched |= {
            f"attention, {label} block": block.get_submodule("attention"),
            f"MLP, {label} block": block.get_submodule("mlp"),
        }
    watched["stream"] = blocks[-1]
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen[name] = output.float()

        return hook

    handles = [one.register_forward_hook(note(name)) for name, one in watched.items()]
    module(images)
    for handle in handles:
        handle.remove()
    seen["what all blocks add"] = seen["stream"] - seen["embedding"]
    return {name: float(value.square().mean().sqrt()) for name, value in seen.items()}


def _images(seed: int) -> Tensor:
    """Float32 [IMAGES, 3, SIDE, SIDE] in [-1, 1], smooth as photographs are."""
    coarse = torch.rand(IMAGES, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(-1, 1)


def plot_coordinates(path: Path, checks: Sequence[CoordinateCheck]) -> None:
    """One panel for each check: activations against size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(checks), figsize=(6 * len(checks), 4.8), layout="constrained", sharey=True, squeeze=False
    )
    for panel, check in zip(panels[0], checks, strict=True):
        for name, scales in check.scales.items():
            panel.plot(check.sizes, scales, "o-", label=f"{name} ({check.slopes[name]:+.2f})")
        rates = f"transferred from {check.along} {check.sizes[0]}" if check.transferred else "the same for all sizes"
        panel.set(xscale="log", yscale="log", xlabel=check.along, title=f"initialisation and rates {rates}")
        panel.set_xticks(check.sizes, [str(size) for size in check.sizes])
        panel.minorticks_off()
        panel.legend(title="activation (slope)", fontsize=8)
    panels[0][0].set_ylabel("root mean square after training")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
