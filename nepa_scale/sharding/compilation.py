"""torch.compile of a module's units, where it works.

Each unit on its own: equal ones share one graph, and sharding, hooks and accumulation stay outside of it. Training has
one graph for the embedding and one for the blocks (two where the first block alone has no drop path), and evaluation
others, made once for its batches and once for a last one that is shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from nepa_scale.config import ConfigError
from nepa_scale.sharding.strategy import units_of


def choose_compilation(requested: bool | None, device: torch.device) -> tuple[bool, str]:
    """Whether units are compiled, and why not where one would expect it; None: on GPUs, if it works there.

    Raises:
        ConfigError: it was asked for, and does not work here.
    """
    if requested is False or (requested is None and device.type != "cuda"):
        return False, ""
    trouble = _trouble(device.type)
    if trouble and requested:
        raise ConfigError(
            f"compile=true, but torch.compile does not work here: {trouble}; mend it, or set compile=false"
        )
    if requested is None and not trouble:  # nobody insists: what turns out not to compile runs as it is, with a warning
        from torch import _dynamo  # takes a second or two

        _dynamo.config.suppress_errors = True
    return not trouble, trouble


def compile_units(module: nn.Module, enabled: bool, memory_budget: float = 1.0) -> None:
    """Compiles the forward of each unit, in place; memory_budget: the share of the activations that they may keep.

    1 keeps what makes the step fastest, 0 a unit's input. In between the compiler solves for what costs the least time
    to redo; but where a unit's weights are larger than all that it keeps, torch leaves such a budget aside.
    """
    if enabled:
        backend = _inductor_within(memory_budget) if memory_budget < 1 else "inductor"
        for unit in units_of(module):
            unit.forward = torch.compile(unit.forward, backend=backend)


@lru_cache
def _inductor_within(memory_budget: float) -> Callable[[torch.fx.GraphModule, list[Tensor]], Any]:
    """The compiler with a budget of its own: torch's is a setting of the process, and units of different budgets would
    share graphs; graphs of different backends are never shared."""

    def compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # takes a second or two

        with functorch.patch(activation_memory_budget=memory_budget):
            return compile_fx(graph, inputs)

    return compiled


@lru_cache
def _trouble(device: str) -> str:
    """What keeps the compiler from working here (no Triton, no C++ compiler), in a line; empty: nothing does."""
    try:
        torch.compile(lambda x: (2 * x + 1).relu())(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, by what is missing
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no more is said'}"
    return ""
