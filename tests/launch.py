"""Real shards and real processes for end-to-end tests."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "nepa_scale" / "train.py"
# a model and a run of seconds; tests override what they are about
TINY = [
    "model.width=48", "model.depth=2", "model.heads=3", "model.patch_size=8", "model.image_size=32",
    "model.layer_scale=0.1", "optimizer.lr=1e-3", "schedule.warmup_steps=2", "train.steps=6",
    "train.global_batch_size=8", "data.val=null", "train.precision=fp32", "train.log_every=1", "ema.decay=0.9",
    "data.workers=1",
]  # fmt: skip


def write_shards(folder: Path, samples: int = 40, per_shard: int = 16, classes: int = 4, seed: int = 0) -> Path:
    """Plain WebDataset tars of small JPEGs, written with nothing but the standard library and Pillow."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"shard-{first // per_shard:06d}.tar", "w") as tar:
            for sample in range(first, min(first + per_shard, samples)):
                label = sample % classes
                coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                coarse[..., label % 3] //= 1 + label
                buffer = io.BytesIO()
                Image.fromarray(coarse).resize((48, 40), Image.Resampling.BILINEAR).save(buffer, "JPEG")
                for name, data in (("jpg", buffer.getvalue()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{sample:05d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def launcher(kind: str, ranks: int) -> list[str]:
    """The command before `train.py`: "python", "torchrun" or "deepspeed"."""
    if kind == "python":
        return [sys.executable]
    if kind == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with socket.socket() as free:  # its default port may be another test's
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)
    ]  # fmt: skip


def run_training(
    arguments: list[str],
    kind: str = "python",
    ranks: int = 1,
    timeout: float = 240,
    checkout: Path = REPOSITORY,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the train.py of a checkout to its end and returns what it printed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)} | environment
    if not torch.cuda.is_available():
        variables["DS_ACCELERATOR"] = "cpu"
    return subprocess.run(
        [*launcher(kind, ranks), str(checkout / TRAIN.relative_to(REPOSITORY)), *arguments],
        env=variables, capture_output=True, text=True, timeout=timeout, cwd=checkout,
    )  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run that have a loss, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
