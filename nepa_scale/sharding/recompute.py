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

_WEIGHT = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2, torch.ops.aten.linear.default: 1}  # argument
_ATTENTION = {
    torch.ops.aten.bmm.default,  # where no fused kernel is
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products(_context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keeps what costs time to redo; norms, activations, rotations and the square product are redone."""
    if operator in _WEIGHT:
        rows, columns = args[_WEIGHT[operator]].shape
        kept = rows != columns
    else:
        kept = operator in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_units(module: nn.Module, mode: str) -> None:
    """Makes each of the module's units but the first (the embedding, cheap and kept as the target) drop activations.

    mode: "none"; "selective" keeps the results of attention and of matrix products, but for square weights: the
        attention's output, 1/36 of the work for 1/12 of what would be kept; "full" keeps only a unit's input
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
