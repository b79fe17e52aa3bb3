"""Which updates are refused: those whose gradient norm is not finite, or a spike among the norms before it."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 64  # applied updates whose norms are kept
_ENOUGH = 16  # of them before any norm can be called a spike


class UpdateGuard:
    """Called by a strategy with the gradient norm, between the backward pass and the update.

    Everything stays on the device: neither the norms nor the verdict are waited for.

    spike_factor: a norm above this many times the median of the last `WINDOW` applied ones is a spike; 0: none is
    """

    def __init__(self, spike_factor: float, device: torch.device) -> None:
        self.spike_factor = spike_factor
        self.refused = torch.zeros((), dtype=torch.bool, device=device)
        self._norms = torch.full((WINDOW,), float("nan"), device=device)

    def __call__(self, norm: Tensor) -> Tensor:
        """norm: []; whether to refuse, bool [], also kept as `refused`."""
        refused = ~norm.isfinite()
        if self.spike_factor > 0:
            ordered = self._norms.sort().values  # NaN, where nothing has been yet, comes last
            count = self._norms.isfinite().sum()
            median = ordered.gather(0, ((count - 1).clamp(min=0) // 2).view(1))[0]
            refused = refused | ((count >= _ENOUGH) & (norm > self.spike_factor * median))
            moved = torch.cat([self._norms[1:], norm.to(self._norms).view(1)])
            self._norms = torch.where(refused, self._norms, moved)
        self.refused = refused
        return refused

    def state(self) -> list[float | None]:
        """The norms, oldest first, for a checkpoint's `meta.json`. Waits for the device."""
        return [norm if norm == norm else None for norm in self._norms.tolist()] if self.spike_factor > 0 else []

    def load(self, norms: list[float | None]) -> None:
        """Takes over what `state` returned; an empty list (of a run without a guard) starts anew."""
        values = [float("nan") if norm is None else norm for norm in norms] or [float("nan")] * WINDOW
        self._norms = torch.tensor(values, dtype=self._norms.dtype, device=self._norms.device)
