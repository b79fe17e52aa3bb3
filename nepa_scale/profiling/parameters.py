"""Shapes of the parameters, by the unit (embedding, blocks, the rest) that shards as one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import Architecture, CausalViT
from nepa_scale.objectives import NextEmbedding, build_pretext
from nepa_scale.objectives.pretext import PRETRAINING_ONLY

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Units:
    """Parameter shapes by name: of the embedding, of one block (all are alike), and of what no unit holds."""

    embedding: Shapes
    block: Shapes
    rest: Shapes
    depth: int

    @property
    def all(self) -> list[Shapes]:
        """Every unit, in forward order, the rest last."""
        return [self.embedding, *[self.block] * self.depth, self.rest]


def elements(shapes: Shapes) -> int:
    """How many parameters these are."""
    return sum(math.prod(shape) for shape in shapes.values())


@lru_cache(maxsize=64)
def parameter_units(architecture: Architecture) -> Units:
    """The parameters of the pretraining module, read off one that is built on the meta device."""
    with torch.device("meta"):
        task = NextEmbedding(CausalViT(architecture), ObjectiveConfig())
    named = {name.removeprefix("backbone."): tuple(p.shape) for name, p in task.named_parameters()}
    embedding = {name: shape for name, shape in named.items() if name.startswith("embedding.")}
    block = {name: shape for name, shape in named.items() if name.startswith("blocks.0.")}
    rest = {name: shape for name, shape in named.items() if not name.startswith(("embedding.", "blocks."))}
    return Units(embedding, block, rest, architecture.depth)


def count_parameters(architecture: Architecture) -> int:
    """All parameters of the backbone; pretraining with next_embedding has no others."""
    return sum(elements(unit) for unit in parameter_units(architecture).all)


def pretraining_only_parameters(architecture: Architecture, objective: ObjectiveConfig) -> int:
    """Those of the decoder or predictor that pretraining trains beside the backbone."""
    with torch.device("meta"):
        task = build_pretext(CausalViT(architecture), objective)
    return sum(p.numel() for name, p in task.named_parameters() if name.startswith(PRETRAINING_ONLY))
