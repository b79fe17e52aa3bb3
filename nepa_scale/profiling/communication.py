"""How many bytes the ranks of a strategy exchange in a training step, and a counter that checks it on real ranks.

A volume is the payload: elements that a collective reduces, scatters or gathers, times their size. A ring all-reduce
of n bytes over W ranks makes each send 2n (W - 1) / W; a reduce-scatter or an all-gather half of that. In units of the
P parameters, with gradients reduced in fp32 and weights gathered in the precision of the products, and in the limit of
many ranks, a rank sends:

  ddp            2P: all-reduce of the gradients
  zero1, zero2   3P: all-reduce of the gradients, all-gather of the updated weights. The method needs 2P, a
                 reduce-scatter in place of the all-reduce; DeepSpeed 0.19 all-reduces its buckets
  fsdp, zero3    3P: all-gather in the forward and in the backward pass, reduce-scatter of the gradients. DeepSpeed
                 keeps weights gathered between the two passes while its limit allows (`MAX_LIVE`): then 2P
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters of ds_configs/


@dataclass(frozen=True)
class Volume:
    """Elements and bytes of one rank's payloads in a step; `sent` is what leaves it over a ring."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0

    def sent(self, world_size: int) -> float:
        """Bytes that each rank sends (and receives) over a ring of `world_size`."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def step_volume(strategy: str, parameters: int, precision: str, accumulation: int = 1) -> Volume:
    """Payload bytes of one optimiser step, of `accumulation` micro-batches.

    Gradients are reduced once a step (FSDP, ZeRO-2 and -3: once a micro-batch), in fp32; weights are gathered in the
    precision of the products. What takes a few bytes (norms, losses) is left out, and so is padding.
    """
    reduced, gathered = 4 * parameters, (2 if precision == "bf16" else 4) * parameters
    if strategy == "single":
        return Volume()
    if strategy == "ddp":
        return Volume(all_reduce=reduced)
    if strategy == "zero1":
        return Volume(all_reduce=reduced, all_gather=gathered)
    if strategy == "zero2":
        return Volume(all_reduce=accumulation * reduced, all_gather=gathered)
    gathers = 1 if strategy == "zero3" and parameters <= MAX_LIVE else 2
    return Volume(reduce_scatter=accumulation * reduced, all_gather=gathers * accumulation * gathered)


class CountedCollectives(TorchDispatchMode):
    """Counts the payload bytes of this rank's collectives by kind, whoever calls them: every one is an operator.

    A kind is what was asked for: an all-reduce whose result each rank needs only a part of is still an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self._count(name.split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        tensors = [value for value in tree_leaves(args[0]) if isinstance(value, Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if name.startswith(("allreduce", "all_reduce")):
            self.bytes["all_reduce"] += size
        elif "reduce_scatter" in name:
            whole = [value for value in tree_leaves(args[1]) if isinstance(value, Tensor)] or tensors
            self.bytes["reduce_scatter"] += sum(tensor.numel() * tensor.element_size() for tensor in whole)
        elif "allgather" in name or "all_gather" in name:
            self.bytes["all_gather"] += size  # the outputs, of all ranks
        elif name.startswith("reduce_"):
            self.bytes["reduce"] += size
        elif name.startswith("broadcast"):
            self.bytes["broadcast"] += size


def count_step(strategy: Any, inputs: dict[str, Any]) -> dict[str, int]:
    """Payload bytes of one more step of a built strategy. Collective."""
    with CountedCollectives() as counted:
        strategy.forward_backward(inputs, micro_step=0)
        strategy.step(0.0)
    torch.distributed.barrier()
    return dict(counted.bytes)
