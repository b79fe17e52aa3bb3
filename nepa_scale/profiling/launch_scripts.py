"""A plan as something to run: the command, and the SLURM script."""

from __future__ import annotations

from pathlib import Path

from nepa_scale.config import load_config
from nepa_scale.profiling.plan import Choice, Job

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "pretrain"


def overrides(job: Job, choice: Choice) -> list[str]:
    """The configuration file and the keys that turn it into this plan."""
    model = job.model
    own = CONFIGS / f"{model.size}{model.patch_size}.yaml"
    base = own if own.is_file() else CONFIGS / "vit_l14.yaml"
    keys = {} if own.is_file() else {"output": f"runs/{model.size}{model.patch_size}"}
    written = load_config(base).model
    keys |= {
        f"model.{name}": "null" if value is None else str(value).replace(" ", "")
        for name, value in vars(model).items()
        if value != getattr(written, name)
    }
    keys |= {
        "strategy": choice.strategy,
        "activation_checkpointing": choice.recompute,
        "train.global_batch_size": str(job.global_batch),
        "train.micro_batch_size": str(choice.micro_batch),
        "train.precision": job.precision,
        "train.epochs": f"{job.epochs:g}",
    }
    if not job.ema:
        keys["ema.decay"] = "0"
    return [f"--config configs/pretrain/{base.name}", *(f"{key}={value}" for key, value in keys.items())]


def command(job: Job, choice: Choice) -> str:
    """For one host; for several, the same on each of them with MASTER_ADDR set to the first."""
    if job.gpus == 1:
        launcher = "python"
    elif job.hosts == 1:
        launcher = f"torchrun --nproc_per_node {job.gpus}"
    else:
        launcher = (
            f"torchrun --nnodes {job.hosts} --nproc_per_node {job.device.per_host} "
            "--rdzv_backend c10d --rdzv_endpoint $MASTER_ADDR:29500"
        )
    return " \\\n    ".join([f"{launcher} nepa_scale/train.py", *overrides(job, choice)])


def slurm_script(job: Job, choice: Choice, hours: int = 24) -> str:
    """An sbatch script: one task a GPU; a run that the time limit ends goes on when it is submitted again."""
    per_host = min(job.gpus, job.device.per_host)
    lines = " \\\n    ".join(["srun python nepa_scale/train.py", *overrides(job, choice)])
    return f"""#!/bin/bash
#SBATCH --job-name=nepa_{job.model.size}
#SBATCH --nodes={job.hosts}
#SBATCH --ntasks-per-node={per_host}
#SBATCH --gpus-per-node={per_host}
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
{lines}
"""
