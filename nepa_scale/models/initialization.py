"""Initial weights, as a pure function of (seed, parameter name).

No rank has to hold more than one whole parameter, and the draw depends neither on the order in which modules are built
nor on how they are sharded: every strategy starts from the same weights.

The official code draws from a normal of standard deviation 0.02 truncated at +-2, that is at a hundred deviations: a
plain normal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nepa_scale.counter_random import hash_words
from nepa_scale.models.sizes import Architecture
from nepa_scale.models.transfer import initial_factor


def initial_values(name: str, shape: tuple[int, ...], architecture: Architecture, seed: int) -> Tensor:
    """The initial value of parameter `name`, float32 of `shape`, on the host.

    Linear and patch weights, the CLS and mask tokens: normal; biases 0; norms 1; LayerScale its constant; with a base
    width or depth, scaled from these (see `transfer`). The same weight in a backbone and in a task built around it
    (`backbone.<name>`) has the same value.
    """
    name = name.removeprefix("backbone.")
    factor = initial_factor(name, architecture)
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return torch.zeros(shape)
    if kind in ("attention_scale", "mlp_scale"):
        assert architecture.layer_scale is not None, name
        return torch.full(shape, architecture.layer_scale * factor)
    if owner.endswith("norm"):
        return torch.ones(shape)
    if kind in ("weight", "cls_token", "mask_token"):
        generator = torch.Generator().manual_seed(hash_words("initialization", seed, name) >> 1)
        std = architecture.init_std * factor
        return torch.empty(math.prod(shape)).normal_(0.0, std, generator=generator).view(shape)
    raise KeyError(f"no initial value is defined for the parameter {name}")


@torch.no_grad()
def initialize_module(module: nn.Module, architecture: Architecture, seed: int) -> None:
    """Fills all of an unsharded module's parameters in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_values(name, tuple(parameter.shape), architecture, seed))
