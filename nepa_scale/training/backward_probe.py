"""Was this rank's own backward pass finite? After the reduction, all ranks have the same bad gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nepa_scale.sharding.strategy import units_of


class BackwardProbe:
    """Looks at the gradient of the first unit's output, in which every backward pass ends: what is not finite further
    up shows there. Costs one pass over that gradient, and no wait for the device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        units_of(module)[0].register_forward_hook(self._watch)

    def take(self) -> Tensor:
        """Whether all passes since the last call were finite, bool []."""
        finite, self._finite = self._finite, torch.ones((), dtype=torch.bool, device=self._device)
        return finite

    def _watch(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._finite = self._finite & gradient.isfinite().all()
