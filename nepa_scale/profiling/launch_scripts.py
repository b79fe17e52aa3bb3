"""A plan as something to run: a configuration file, what the plan changes in it, the command and the SLURM script."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nepa_scale.config import Config, ConfigError, flatten, load_config, to_dict
from nepa_scale.profiling.plan import Choice, Job

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "pretrain"
ANY_SIZE = CONFIGS / "vit_l14.yaml"  # the recipe for a model that has no file of its own


@dataclass(frozen=True)
class Source:
    """The run that a plan is for.

    file: its configuration
    written: as the file has it
    wanted: with what the user asked for over it
    """

    file: Path
    written: Config
    wanted: Config

    @property
    def name(self) -> str:
        return str(self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else self.file)


def find_source(file: Path | None, size: str | None, patch_size: int | None, overrides: Sequence[str]) -> Source:
    """The configuration file that was named, or that of the model, with `overrides` (section.key=value) over it.

    size, patch_size: null: the file's; where none is named, vit_b and 14. A model without a file of its own has the
        recipe of `ANY_SIZE`.
    Raises:
        ConfigError: see `load_config`; or the run is not one that can be planned.
    """
    words = [f"model.size={size}"] if size else []
    words += [f"model.patch_size={patch_size}"] if patch_size else []
    if file is None:
        name = f"{size or 'vit_b'}{patch_size or 14}"
        file = CONFIGS / f"{name}.yaml"
        if not file.is_file():
            file, words = ANY_SIZE, [f"model.size={size or 'vit_b'}", *words, f"output=runs/{name}"]
    wanted = load_config(file, [*words, *overrides])
    if wanted.task != "pretrain" or wanted.objective.name != "next_embedding":
        what = wanted.task if wanted.task != "pretrain" else f"objective.name={wanted.objective.name}"
        raise ConfigError(f"{file} is a run of {what}: only pretraining by next_embedding can be planned")
    return Source(file.resolve(), load_config(file), wanted)


def planned_changes(source: Source, job: Job, choice: Choice) -> dict[str, tuple[Any, Any]]:
    """The keys in which the planned run differs from the file: as written there, and as planned."""
    planned = copy.deepcopy(source.wanted)
    planned.strategy, planned.activation_checkpointing = choice.strategy, choice.recompute
    planned.train.global_batch_size, planned.train.micro_batch_size = job.global_batch, choice.micro_batch
    old, new = flatten(to_dict(source.written)), flatten(to_dict(planned))
    return {key: (old[key], value) for key, value in new.items() if value != old[key]}


def overrides(source: Source, job: Job, choice: Choice) -> list[str]:
    """The configuration file and the keys that turn it into this plan."""
    changes = planned_changes(source, job, choice)
    return [f"--config {source.name}", *(f"{key}={as_word(new)}" for key, (_, new) in changes.items())]


def as_word(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "")


def command(source: Source, job: Job, choice: Choice) -> str:
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
    return " \\\n    ".join([f"{launcher} nepa_scale/train.py", *overrides(source, job, choice)])


def slurm_script(source: Source, job: Job, choice: Choice, hours: int = 24) -> str:
    """An sbatch script: one task a GPU; a run that the time limit ends goes on when it is submitted again."""
    per_host = min(job.gpus, job.device.per_host)
    lines = " \\\n    ".join(["srun python nepa_scale/train.py", *overrides(source, job, choice)])
    return f"""#!/bin/bash
#SBATCH --job-name=nepa_{Path(source.wanted.output).name}
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
