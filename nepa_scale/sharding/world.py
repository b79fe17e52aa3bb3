"""The processes of a run: who this one is, which device it drives, and how it talks to the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from nepa_scale.config import ConfigError
from nepa_scale.sharding.fresh_store import fresh_store


@dataclass(frozen=True)
class World:
    """One process among `size`; `device` is its own."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# what each launcher calls rank, number of ranks and rank on this host: torchrun and deepspeed, then srun
_LAUNCHER_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


def join_world(timeout_seconds: float = 300.0) -> World:
    """Joins the process group that the launcher (deepspeed, torchrun, srun; or none) has laid out.

    timeout_seconds: after which a collective gives up on a rank that does not come
    Raises:
        ConfigError: more ranks on this host than GPUs, or a launcher that gives no address.
    """
    rank, size, local_rank = _read_launcher()
    device = _pick_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        elif "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"{size} ranks were started without MASTER_ADDR and MASTER_PORT: set both to an address of the first "
                "host and a free port there, or use torchrun or deepspeed"
            )
        elif int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            store, *_ = next(rendezvous("env://", rank, size, timeout=timeout))
            store = fresh_store(store, rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, device)


def leave_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _read_launcher() -> tuple[int, int, int]:
    for rank, size, local_rank in _LAUNCHER_VARIABLES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local_rank, "0"))
    return 0, 1, 0


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; start as many ranks"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def numbers_of_ranks(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Each scalar on every rank, in one collective and one wait for the device."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
    return dict(zip(values, torch.stack(of_all_ranks(stacked), dim=1).tolist(), strict=True))


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over all ranks of each scalar."""
    return {name: sum(numbers) / len(numbers) for name, numbers in numbers_of_ranks(values).items()}


def of_all_ranks(part: Tensor) -> list[Tensor]:
    """The ranks' tensors of one shape, in the order of the ranks. Collective."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return parts


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' numbers."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)
