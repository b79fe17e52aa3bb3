"""The one description of training state that all strategies share.

However a strategy lays out its state, what a rank holds of a parameter is a contiguous range of that parameter's
elements in row-major order: all of it (single, DDP), some rows (FSDP2, `Shard(0)`), a fragment of a flat buffer (ZeRO-1
and 2) or an equal part (ZeRO-3). Initialisation, the moving average and checkpoints are written against `Shard`s only,
which is why they work the same everywhere, and why any strategy can read what any other wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Shard:
    """This rank's part of one parameter and of its training state.

    name: the parameter's name in the unwrapped model
    shape: of the whole parameter
    start, stop: the range held here, counted in elements of the flattened parameter; may be empty
    tensors: float32, one-dimensional [stop - start] views of the live state, to read and to write in place:
        "master" (the weights), "exp_avg" and "exp_avg_sq" (AdamW's moments) and, where there is one, "ema"
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]
