"""Run folders in the format of train.py, with metrics that a known law gives, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nepa_scale.config import Config, ModelConfig, TrainConfig, to_dict
from nepa_scale.profiling import training_costs
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.run_folder import provenance

BATCH, STEPS_PER_EPOCH = 64, 100
SIZES = ((32, 2), (48, 3), (64, 4), (96, 4))  # width, depth


def config(width: int, depth: int, steps: int | None = None, epochs: float | None = None) -> Config:
    model = ModelConfig(width=width, depth=depth, heads=2, patch_size=8, image_size=32)
    return Config(model=model, train=TrainConfig(steps=steps, epochs=epochs, global_batch_size=BATCH))


def flops_per_image(width: int, depth: int) -> float:
    return training_costs(Pretraining(config(width, depth, 1)).architecture, None).train_flops_per_image


def law(parameters: float, samples: float) -> float:
    """1 + loss."""
    return 0.1 + 4 / parameters**0.28 + 6 / samples**0.35


def write_run(
    folder: Path, width: int, depth: int, steps: int, *, until: int | None = None, knn: bool = True,
    collapses: bool = False, epochs: float | None = None,
) -> Path:  # fmt: skip
    """A run of `steps` that has got to step `until` (default: to its end), in twenty logged rows or fewer."""
    folder.mkdir(parents=True)
    values = config(width, depth, None if epochs else steps, epochs)
    described = to_dict(values) | {"provenance": provenance() | {"command": f"train.py output={folder.name}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    n, per_image = Pretraining(values).parameters, flops_per_image(width, depth)
    every = max(1, steps // 20)
    rows: list[dict[str, Any]] = []
    if knn:
        rows.append({"step": 0, "knn_top1": 0.12, "knn_top1_untrained": 0.12, "knn_top1_pixels": 0.21})
    for step in [*range(every, (until or steps), every), until or steps]:
        samples = step * BATCH
        loss = law(n, samples)
        rows.append(
            {
                "step": step, "epoch": step / STEPS_PER_EPOCH, "samples_seen": samples, "tokens_seen": samples * 17,
                "flops_seen": samples * per_image, "loss": loss - 1, "grad_norm": 0.5, "lr": 1e-3, "skipped_steps": 0,
                "images_per_second": 4e9 / n, "tokens_per_second": 17 * 4e9 / n, "step_seconds": 0.1,
                "data_seconds": 0.01, "mfu": None, "peak_memory_bytes": int(5e8 + 40 * n), "one_plus_loss": loss,
                "centred_cosine": 1 - 1.3 * loss, "copy_cosine": 0.5, "copy_win": 0.4,
                "embedding_std": 0.001 if collapses else 0.1, "effective_rank": 1.01 if collapses else 40.0,
                "target_cosine": 0.999 if collapses else 0.2,
            }
        )  # fmt: skip
        if knn:
            weights = "ema" if 2 * step > steps else "raw"  # as a run's average grows old
            rows.append({"step": step, "weights": weights, "knn_top1": 1 - (0.3 + 20 / n**0.4 + 3 / samples**0.3)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sweep(folder: Path) -> Path:
    """Runs of four sizes at three budgets."""
    for budget in (3e11, 1e12, 3e12):
        for width, depth in SIZES:
            steps = max(1, round(budget / flops_per_image(width, depth) / BATCH))
            write_run(folder / f"w{width}-{budget:.0e}", width, depth, steps)
    return folder
