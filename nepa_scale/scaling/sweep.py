"""A grid of runs over sizes, compute budgets and seeds: planned from FLOPs, run by train.py, resumable.

A run's folder is named by what determines the run, so that the same sweep finds its finished runs again, and a changed
one makes only what is new.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from nepa_scale.config import Config, ConfigError, flatten, load_config, nearest, to_dict
from nepa_scale.models import resolve_architecture
from nepa_scale.profiling import training_costs
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.run_folder import read_json_lines
from nepa_scale.training.run_record import record_in

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LOG = "output.txt"  # in a run's folder: what train.py printed
ATTEMPTS = 2
_KEYS = (
    "base", "output", "warmup", "sizes", "budgets", "samples", "seeds", "variants", "grid", "overrides", "finetune",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid.

    samples: images seen; flops: forward and backward
    after: the pretraining whose weights a fine-tuning starts from
    """

    name: str
    folder: Path
    configs: list[Path]
    overrides: dict[str, Any]
    parameters: int
    steps: int
    samples: int
    flops: float
    after: PlannedRun | None = None

    def arguments(self) -> list[str]:
        """Of train.py."""
        keys = [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()]
        files = [word for path in self.configs for word in ("--config", str(path))]
        return [*files, *keys, f"output={self.folder}"]

    def last_row(self) -> dict[str, Any]:
        """Everything that the run's metrics hold last; empty before the first."""
        merged: dict[str, Any] = {}
        for row in read_json_lines(self.folder / "metrics.jsonl"):
            merged |= row
        return merged

    def mixed(self) -> str:
        """How the run's settings changed under way, by other hands: then it is not what was planned."""
        record = record_in(self.folder)
        return record.mixed() if record else ""

    def finished(self) -> bool:
        """Whether the last step was made and saved."""
        return (self.folder / "checkpoints" / f"step_{self.steps:08d}").is_dir()


@dataclass
class Sweep:
    """What a file in configs/sweeps says; exactly one of `budgets` (FLOPs of a run) and `samples` (images) is given.

    variants: YAML files, each in turn over the base: rows of an ablation
    grid: keys of the configuration, each with the values that it takes in turn
    finetune: what follows each run: the fine-tuning of `config` (a YAML file), of `samples` images, with `overrides`
    """

    base: str
    output: str
    sizes: dict[str, dict[str, Any]]
    budgets: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    warmup: float = 0.05
    variants: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


def read_sweep(path: Path) -> Sweep:
    """
    Raises:
        ConfigError: it cannot be read, a key is unknown or missing, or not just one of budgets and samples is given.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the sweep {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the keys of a sweep: {', '.join(_KEYS)}")
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"unknown key '{key}' in {path}{nearest(str(key), _KEYS)}")
    for key in ("base", "output", "sizes"):
        if not values.get(key):
            raise ConfigError(f"{path} lacks '{key}'")
    sweep = Sweep(**values)
    if bool(sweep.budgets) == bool(sweep.samples):
        raise ConfigError(
            f"{path} must give one of 'budgets' (training FLOPs of a run) and 'samples' (images of a run)"
        )
    for key, values in sweep.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid gives '{key}' no list of values")
    if not isinstance(sweep.variants, list):
        raise ConfigError(f"{path}: variants must be a list of YAML files")
    if sweep.finetune and not {"config", "samples"} <= set(sweep.finetune) <= {"config", "samples", "overrides"}:
        raise ConfigError(f"{path}: finetune must have 'config' and 'samples', and may have 'overrides'")
    sweep.budgets = [float(budget) for budget in sweep.budgets]  # YAML reads 1e12 as a word
    return sweep


def plan_runs(sweep: Sweep) -> list[PlannedRun]:
    """All runs of the grid, those of the first seed first and each seed's cheapest first.

    Variants that come to the same run are one, by the first's name.

    Raises:
        ConfigError: a size or override is wrong, or a budget is less than one step of a size.
    """
    runs: list[PlannedRun] = []
    variants: list[str | None] = [*sweep.variants] or [None]
    for seed in sweep.seeds:
        planned: dict[str, PlannedRun] = {}
        for size, amount, variant, *values in product(
            sweep.sizes, sweep.budgets or sweep.samples, variants, *sweep.grid.values()
        ):
            digest, run = _plan(sweep, size, amount, seed, variant, dict(zip(sweep.grid, values, strict=True)))
            planned.setdefault(digest, run)
        for run in sorted(planned.values(), key=lambda run: run.flops):
            runs += [run, _plan_finetuning(sweep, run)] if sweep.finetune else [run]
    return runs


def _plan(
    sweep: Sweep, size: str, amount: float, seed: int, variant: str | None, varied: dict[str, Any]
) -> tuple[str, PlannedRun]:
    """The run, and a digest of what determines it."""
    configs = [Path(sweep.base)] + ([Path(variant)] if variant else [])
    overrides = {
        **sweep.overrides,
        **sweep.sizes[size],
        **varied,
        "train.seed": seed,
        "train.epochs": None,
        "train.steps": 1,
    }
    config = _config(configs, overrides)
    task = Pretraining(config)
    batch = config.train.global_batch_size
    per_image = training_costs(task.architecture, None, config.objective).train_flops_per_image
    steps = int(amount / (per_image * batch)) if sweep.budgets else int(amount // batch)
    if steps < 1:
        unit = f"{per_image * batch:.3g} FLOPs" if sweep.budgets else f"{batch} images"
        raise ConfigError(f"{amount:.3g} is less than one step of size {size}, which takes {unit}: raise it")
    overrides |= {"train.steps": steps, "schedule.warmup_steps": max(1, round(sweep.warmup * steps))}
    identity = flatten(to_dict(_config(configs, overrides)))
    identity.pop("output")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    told = [f"{key.rpartition('.')[2]}={value}" for key, value in varied.items()]
    named = ["_".join(Path(variant).with_suffix("").parts[-2:])] if variant else []
    name = "-".join([size, f"{amount:.3g}", *named, *told, f"s{seed}"])
    run = PlannedRun(
        name, Path(sweep.output) / f"{name}-{digest}", configs, overrides, task.parameters, steps,
        steps * batch, steps * batch * per_image,
    )  # fmt: skip
    return digest, run


def _plan_finetuning(sweep: Sweep, run: PlannedRun) -> PlannedRun:
    """Of the run's own architecture; the switches of its objective are kept for the record."""
    pretraining, files = _config(run.configs, run.overrides), [Path(sweep.finetune["config"])]
    own = flatten({"model": to_dict(pretraining)["model"], "objective": to_dict(pretraining)["objective"]})
    overrides = {key: value for key, value in own.items() if key not in _FINETUNING_SAYS}
    overrides |= {"finetune.weights": str(run.folder), "train.seed": pretraining.train.seed, "train.epochs": None}
    overrides |= sweep.finetune.get("overrides", {})
    config = _config(files, overrides | {"train.steps": 1})
    batch = config.train.global_batch_size
    steps = max(1, int(sweep.finetune["samples"]) // batch)
    overrides |= {"train.steps": steps}
    flops = training_costs(resolve_architecture(config.model), None).train_flops_per_image * steps * batch
    return PlannedRun(
        f"{run.name}-finetuned", run.folder.with_name(f"{run.folder.name}-finetuned"), files, overrides,
        run.parameters, steps, steps * batch, flops, after=run,
    )  # fmt: skip


_FINETUNING_SAYS = ("model.image_size", "model.drop_path", "model.rope_rescale")  # the others are the pretraining's


def _config(configs: Sequence[Path], overrides: dict[str, Any]) -> Config:
    return load_config(configs, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


@dataclass
class Attempt:
    """A run under way."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    number: int
    slot: int


def run_all(
    runs: Sequence[PlannedRun],
    launcher: Sequence[str],
    slots: Sequence[dict[str, str]],
    report: Callable[[list[PlannedRun]], None],
) -> dict[str, str]:
    """Runs what is not finished; what fails is tried once more. Returns why each failed run did.

    launcher: the command before train.py
    slots: as many runs go on at a time; of each, what its run's environment has beside this program's
    report: is told once a second which runs are under way
    Raises:
        KeyboardInterrupt: after the runs under way have saved and ended; the same sweep goes on from there.
    """
    waiting = [(run, 1) for run in runs if not run.finished()]
    active: list[Attempt] = []
    failed: dict[str, str] = {}
    try:
        while waiting or active:
            free = sorted(set(range(len(slots))) - {attempt.slot for attempt in active})
            ready = [one for one in waiting if one[0].after is None or one[0].after.finished()]
            for slot, (run, number) in zip(free, ready, strict=False):
                waiting.remove((run, number))
                active.append(Attempt(run, _start(run, launcher, slots[slot]), number, slot))
            report([attempt.run for attempt in active])
            time.sleep(min(1.0, 0.2 * len(active)))
            for attempt in [one for one in active if one.process.poll() is not None]:
                active.remove(attempt)
                if attempt.run.finished():
                    continue
                if attempt.number < ATTEMPTS and attempt.process.returncode != 2:
                    waiting.insert(0, (attempt.run, attempt.number + 1))
                else:
                    failed[attempt.run.name] = _last_words(attempt.run)
                    waiting = [one for one in waiting if one[0].after is not attempt.run]
    finally:
        for attempt in active:  # they save what they have, and end
            attempt.process.send_signal(signal.SIGTERM)
        for attempt in active:
            attempt.process.wait()
    return failed


def _start(run: PlannedRun, launcher: Sequence[str], slot: dict[str, str]) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("ab") as log:
        # a group of its own: the terminal's Ctrl-C reaches the sweep, which passes it on once
        command = [*launcher, str(TRAIN), *run.arguments()]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | slot)


def _last_words(run: PlannedRun) -> str:
    lines = (run.folder / LOG).read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("error")] or lines or ["it printed nothing"]
    return f"{said[-1]} ({run.folder / LOG})"


def slurm_array(runs: Sequence[PlannedRun], launcher: Sequence[str]) -> str:
    """A script for sbatch, with one task of the array for each run of the grid."""
    commands: list[str] = []
    for run in runs:  # a fine-tuning goes on in the task of its pretraining
        command = " ".join([*launcher, str(TRAIN), *(f"'{word}'" for word in run.arguments())])
        if run.after is None:
            commands.append(command)
        else:
            commands[-1] += f" && {command}"
    cases = "\n".join(f"  {number}) {command} ;;" for number, command in enumerate(commands))
    return (
        "#!/bin/bash\n#SBATCH --job-name=nepa_sweep\n"
        f"#SBATCH --array=0-{len(commands) - 1}\n#SBATCH --signal=USR1@120  # saves and ends; requeue to go on\n"
        f"#SBATCH --requeue\ncase $SLURM_ARRAY_TASK_ID in\n{cases}\nesac\n"
    )


def measured_rate(runs: Sequence[PlannedRun]) -> float | None:
    """FLOP/s that a run has sustained, the median of those that have steps; None before the first."""
    rates = []
    for run in runs:
        row = run.last_row()
        if row.get("images_per_second"):
            rates.append(row["images_per_second"] * run.flops / run.samples)
    return statistics.median(rates) if rates else None


def default_launcher() -> list[str]:
    """One process."""
    return [sys.executable]
