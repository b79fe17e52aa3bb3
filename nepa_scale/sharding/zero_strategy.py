"""DeepSpeed's ZeRO stages 1, 2 and 3, with or without offload.

The engine does the sharding, the reductions, the accumulation, the clipping and the skipping of steps that are not
finite. What is ours is the optimiser (torch's AdamW, the same as everywhere), which leaves out the updates that are
refused for another reason, the initial weights (written to the fp32 masters, since in bf16 the engine would round them
first), and the `Shard` views of the engine's flat buffers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class ZeroStrategy:
    """`zero1`, `zero2` or `zero3`; see `Strategy` for the contract.

    config: a complete DeepSpeed configuration (`resolve_ds_config`)
    """

    replicated = False

    def __init__(
        self,
        name: str,
        world: World,
        build: ModuleBuilder,
        grouping: Grouping,
        settings: StepSettings,
        config: dict[str, Any],
    ) -> None:
        import deepspeed  # takes seconds, and only this strategy needs it
        from deepspeed.utils import logger, set_z3_leaf_module

        logger.setLevel(logging.ERROR)  # it narrates its every step
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

        self.name = name
        self.world = world
        self.settings = settings
        self._stage = int(config["zero_optimization"]["stage"])
        self._linear = F.linear  # zero.Init replaces it for the whole process, and never puts it back
        # an operator for inference on CPUs, which every first start would spend a minute compiling
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists, also where nothing was launched
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
        module = self._build_module(build, config)
        if self._stage == 3:
            # gather a unit's weights as one, around the unit: inside, recomputation would mistake the gathering for
            # part of the computation, and compilation would have to break its graph
            for unit in units_of(module)[1:]:
                set_z3_leaf_module(unit, True)
        recompute_units(module, settings.recompute)
        compile_units(module, settings.compile, settings.memory_budget)
        self.groups, adamw_groups = optimizer_groups(module.named_parameters(), grouping)
        names = [name for group in self.groups for name in group.names]
        parameters = dict(module.named_parameters())
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=make_adamw(adamw_groups, settings), config=config
        )
        self.module: nn.Module = self.engine.module
        self._zero = self.engine.optimizer
        self._adamw: torch.optim.AdamW = self._zero.optimizer
        self._masters = self._flat_masters()
        create_moments(self._adamw, self._masters)
        self._refuse: Refusal = not_finite
        self._refused: Tensor | None = None
        self._adamw.register_step_pre_hook(self._judge)
        self.shards = [shard for n in names if (shard := self._describe(n, parameters[n])) is not None]

    def _build_module(self, build: ModuleBuilder, config: dict[str, Any]) -> nn.Module:
        import deepspeed

        if self._stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=config):
                module = build()
        else:
            with torch.device("meta"):
                module = build()
            module = module.to_empty(device=self.world.device)
            with torch.no_grad():  # the engine reads them before `shards` can be written
                for parameter in module.parameters():
                    parameter.zero_()
        return module.train()

    def _flat_masters(self) -> list[Tensor]:
        """The flat fp32 buffers of this rank, one for each parameter group (stage 3: for each subgroup)."""
        for attribute in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 in bf16 (BF16_Optimizer)
        ):
            if hasattr(self._zero, attribute):
                return list(getattr(self._zero, attribute))
        raise RuntimeError(f"this DeepSpeed keeps no fp32 masters in {type(self._zero).__name__}")

    def _describe(self, name: str, parameter: Any) -> Shard | None:
        """The part of `parameter` that this rank's flat buffers hold, if any."""
        if self._stage == 3:
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            shape, numel = tuple(parameter.ds_shape), parameter.ds_numel
            start = min(self.world.rank * padded, numel)
            length = min(padded, numel - start)  # the last ranks' parts are padded
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            shape, start = tuple(parameter.shape), mapping.lp_fragment_address.start
            length = mapping.lp_fragment_address.numel
        flat = self._masters[group]
        state = self._adamw.state[flat]
        tensors = {"master": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return Shard(
            name=name,
            shape=shape,
            start=start,
            stop=start + length,
            tensors={kind: tensor.narrow(0, offset, length) for kind, tensor in tensors.items()},
        )

    def forward_backward(self, inputs: dict[str, Any], micro_step: int) -> dict[str, Tensor]:
        outputs = self.engine(**inputs)
        self.engine.backward(outputs["loss"])
        if micro_step < self.settings.accumulation - 1:
            self.engine.step()  # counts the micro-step; the last one is `step`
        return {name: tensor.detach() for name, tensor in outputs.items()}

    def step(
        self, lr: float | Sequence[float], refuse: Refusal = not_finite, weight_decay: Sequence[float] | None = None
    ) -> Tensor:
        set_hyperparameters(self._adamw, lr, weight_decay)
        self._refuse, self._refused = refuse, None
        self.engine.step()
        norm = self._norm()
        if self._refused is None:  # the engine has seen for itself that it is not finite
            refuse(norm)
        return norm

    def _norm(self) -> Tensor:
        """The global gradient norm of the last step, or of the one that the engine is in the midst of."""
        return torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.world.device)

    def _judge(self, *_: Any) -> None:
        """Before each of the engine's calls of the optimiser, of which a step has one for each of its groups."""
        if self._refused is None:
            self._refused = self._refuse(self._norm()).float()
        # the fused kernels leave weights, moments and count alone where this flag is set: no wait for the device
        self._adamw.found_inf = self._refused  # type: ignore[attr-defined]

    @torch.no_grad()
    def refresh(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # small weights stay gathered, and what is gathered would stay as it is
        for group in range(len(self._masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def optimizer_steps(self) -> int:
        return int(self._adamw.state[self._masters[0]]["step"])

    def set_optimizer_steps(self, steps: int) -> None:
        for flat in self._masters:
            self._adamw.state[flat]["step"].fill_(steps)

    def close(self) -> None:
        self.engine.destroy()
        F.linear = self._linear
