"""One process, DDP and FSDP2: the strategies in which the module's own fp32 parameters are the masters.

They differ in how the module is wrapped. The optimiser always works on this rank's local, plain tensors (of an FSDP2
parameter: its rows), which share storage with the module's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from nepa_scale.sharding.compilation import compile_units
from nepa_scale.sharding.recompute import recompute_units
from nepa_scale.sharding.shard import Shard
from nepa_scale.sharding.strategy import (
    Grouping,
    ModuleBuilder,
    Refusal,
    StepSettings,
    create_moments,
    make_adamw,
    not_finite,
    optimizer_groups,
    set_hyperparameters,
    units_of,
)
from nepa_scale.sharding.world import World


class TorchStrategy:
    """`single`, `ddp` or `fsdp`; see `Strategy` for the contract."""

    def __init__(
        self, name: str, world: World, build: ModuleBuilder, grouping: Grouping, settings: StepSettings
    ) -> None:
        self.name = name
        self.world = world
        self.settings = settings
        self.replicated = name != "fsdp"
        with torch.device("meta"):
            self.module = build()
        self.module.train()
        recompute_units(self.module, settings.recompute)
        compile_units(self.module, settings.compile, settings.memory_budget)
        if name == "fsdp":
            self._shard_module()
        self.module.to_empty(device=world.device)
        _fill_with_nan(self.module)  # whatever initialisation forgets must not look like a weight
        parameters = dict(self.module.named_parameters())
        self.groups, adamw_groups = optimizer_groups(((n, _local(p)) for n, p in parameters.items()), grouping)
        names = [name for group in self.groups for name in group.names]
        self.optimizer = make_adamw(adamw_groups, settings)
        self._locals = [parameter for group in adamw_groups for parameter in group["params"]]
        self._parameters = [parameters[n] for n in names]
        create_moments(self.optimizer, self._locals)
        self.shards = [self._describe(n) for n in zip(names, self._parameters, self._locals, strict=True)]
        self._wrapped = self._replicate() if name == "ddp" else self.module

    def _shard_module(self) -> None:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        if self.settings.precision == "bf16":
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in units_of(self.module):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)

    def _replicate(self) -> nn.Module:
        return DistributedDataParallel(
            self.module,
            device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            init_sync=False,  # all ranks fill in the same weights themselves
        )

    def _describe(self, item: tuple[str, Tensor, Tensor]) -> Shard:
        name, parameter, local = item
        state = self.optimizer.state[local]
        start = 0
        if isinstance(parameter, DTensor):
            _, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            start = offsets[0] * (parameter.numel() // parameter.shape[0])
        tensors = {"master": local.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return Shard(
            name=name,
            shape=tuple(parameter.shape),
            start=start,
            stop=start + local.numel(),
            tensors={kind: tensor.view(-1) for kind, tensor in tensors.items()},
        )

    def forward_backward(self, inputs: dict[str, Any], micro_step: int) -> dict[str, Tensor]:
        last = micro_step == self.settings.accumulation - 1
        postponed = (
            self._wrapped.no_sync()
            if isinstance(self._wrapped, DistributedDataParallel) and not last
            else contextlib.nullcontext()
        )
        with postponed:
            outputs = self._wrapped(**inputs)
            (outputs["loss"] / self.settings.accumulation).backward()
        return {name: tensor.detach() for name, tensor in outputs.items()}

    @torch.no_grad()
    def step(
        self, lr: float | Sequence[float], refuse: Refusal = not_finite, weight_decay: Sequence[float] | None = None
    ) -> Tensor:
        gradients = [_local(_gradient(parameter)) for parameter in self._parameters]
        norm = self._global_norm(gradients)
        if self.settings.clip > 0:
            # a norm that is not finite leaves the gradients alone: the step is skipped below
            factor = (self.settings.clip / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)
            torch._foreach_mul_(gradients, factor)
        for local, gradient in zip(self._locals, gradients, strict=True):
            local.grad = gradient
        set_hyperparameters(self.optimizer, lr, weight_decay)
        # the fused kernels leave weights, moments and count alone where this flag is set: no wait for the device
        self.optimizer.found_inf = refuse(norm).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        for parameter, local in zip(self._parameters, self._locals, strict=True):
            parameter.grad = local.grad = None
        return norm

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.replicated:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def refresh(self) -> None:
        """The masters are the module's own parameters, but after a forward pass without a backward pass FSDP still
        holds what it gathered of them."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def optimizer_steps(self) -> int:
        return int(self.optimizer.state[self._locals[0]]["step"])

    def set_optimizer_steps(self, steps: int) -> None:
        for local in self._locals:
            self.optimizer.state[local]["step"].fill_(steps)

    def close(self) -> None:
        self._wrapped = self.module


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, any other tensor itself; shares storage."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor.to_local().detach()
        return local.requires_grad_(tensor.requires_grad)
    return tensor


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter received no gradient: it takes no part in the loss")
    return parameter.grad


@torch.no_grad()
def _fill_with_nan(module: nn.Module) -> None:
    for parameter in module.parameters():
        _local(parameter).detach().fill_(float("nan"))
