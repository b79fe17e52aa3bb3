"""Activation checkpointing of a module's units, in place.

Order of the wrappers, from the inside out: recompute, compile, shard. Doing both inside a unit's `forward` leaves its
parameter names alone, and the sharding hooks outside: a recomputed unit finds its weights already gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nepa_scale.sharding.strategy import units_of

_SAVED = {  # the products that cost time to redo; norms, activations and rotations are redone instead
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_units(module: nn.Module, mode: str) -> None:
    """Makes each of the module's units but the first (the embedding, cheap and kept as the target) drop activations.

    mode: "none"; "selective" keeps the results of matrix products and attention; "full" keeps only a unit's input
    """
    if mode == "none":
        return
    for unit in units_of(module)[1:]:
        unit.forward = _recomputed(unit.forward, mode)


def _recomputed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return wrapped
