"""What the training loop may ask of a strategy, and nothing else: how it shards is its own affair.

A strategy is built from a function that makes the module (on whatever device the strategy chooses: no strategy that
shards ever holds the whole of it), one that sorts parameters into optimiser groups, and the settings below. From then
on all strategies do the same arithmetic: fp32 masters and reductions, AdamW on the masters, the global gradient norm,
and a step that is skipped by every rank when that norm is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from nepa_scale.sharding.shard import Shard
from nepa_scale.sharding.world import World


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters (by name) that share a weight decay and a course of the learning rate.

    lr_scale: factor on the run's learning rate
    warmup_scale: factor on the run's warmup
    label: what people know the group by
    weight_decay_end: what the weight decay becomes over the run; None: it stays
    """

    names: tuple[str, ...]
    weight_decay: float
    lr_scale: float = 1.0
    warmup_scale: float = 1.0
    label: str = ""
    weight_decay_end: float | None = None


@dataclass(frozen=True)
class StepSettings:
    """The part of the run's configuration that a strategy needs."""

    precision: str  # fp32 | bf16
    micro_batch_size: int
    accumulation: int
    clip: float  # 0: no clipping
    betas: tuple[float, float]
    eps: float
    recompute: str  # none | selective | full
    compile: bool
    memory_budget: float = 1.0  # share of the activations that compiled units keep


Refusal = Callable[[Tensor], Tensor]  # the gradient norm [] -> whether to leave the update out, bool [] on its device


def not_finite(norm: Tensor) -> Tensor:
    """Refuses what every strategy has to."""
    return ~norm.isfinite()


class Strategy(Protocol):
    """One way to spread a module and its optimiser over the ranks.

    module: what evaluation calls (under `torch.no_grad`, in eval mode)
    groups: the optimiser's
    shards: this rank's part of the masters and moments; the views stay valid for the strategy's life
    replicated: whether every rank holds everything
    """

    name: str
    world: World
    module: nn.Module
    groups: list[ParameterGroup]
    shards: list[Shard]
    replicated: bool

    def forward_backward(self, inputs: dict[str, Any], micro_step: int) -> dict[str, Tensor]:
        """One micro-batch, the `micro_step`-th of its step: the module's outputs, detached; gradients accumulate."""
        ...

    def step(
        self, lr: float | Sequence[float], refuse: Refusal = not_finite, weight_decay: Sequence[float] | None = None
    ) -> Tensor:
        """Clips, updates and clears the gradients. Returns the global gradient norm before clipping, a scalar that may
        still be on the device; where `refuse` says so of it no rank has updated anything.

        lr: the learning rate of all parameters, or one for each of `groups`
        refuse: is called once, with the norm; a norm that is not finite must be refused
        weight_decay: of each of `groups` from now on; None: as it is
        """
        ...

    def refresh(self) -> None:
        """Makes the module compute with the masters after they were written through `shards`."""
        ...

    def set_optimizer_steps(self, steps: int) -> None:
        """Sets the number of updates that AdamW's bias correction counts."""
        ...

    def optimizer_steps(self) -> int:
        """The number of updates made so far; skipped steps do not count."""
        ...

    def close(self) -> None:
        """Releases what the strategy holds beyond the module."""
        ...


ModuleBuilder = Callable[[], nn.Module]
Grouping = Callable[[Sequence[str]], list[ParameterGroup]]


def units_of(module: nn.Module) -> list[nn.Module]:
    """The submodules that are gathered, recomputed and compiled as one, in forward order; the embedding comes first.

    The module that a strategy shards names them in its attribute `units`.
    """
    return list(cast(Any, module).units)


def optimizer_groups(
    named_parameters: Iterable[tuple[str, Tensor]], grouping: Grouping
) -> tuple[list[ParameterGroup], list[dict[str, Any]]]:
    """The groups, and the same as AdamW's, each with its `number`."""
    parameters = dict(named_parameters)
    groups = grouping(list(parameters))
    return groups, [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay, "number": number}
        for number, group in enumerate(groups)
    ]


def make_adamw(groups: list[dict[str, Any]], settings: StepSettings) -> torch.optim.AdamW:
    """The one optimiser of all strategies: torch's AdamW in its fused form, on CPU and GPU alike."""
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def create_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """AdamW's state before the first step, so that it can be read and written like any other."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, lr: float | Sequence[float], weight_decay: Sequence[float] | None
) -> None:
    """The step's learning rate, of all groups or one for each, and weight decay, one for each (None: as it is)."""
    for group in optimizer.param_groups:
        group["lr"] = lr[group["number"]] if isinstance(lr, Sequence) else lr
        if weight_decay is not None:
            group["weight_decay"] = weight_decay[group["number"]]
