"""What evaluation costs: its share of a training run, and kNN over as many features as ImageNet has images.

The share is that of a run of train.py that evaluates as often, against what it trains, as the defaults do on ImageNet:
every 5000 steps of 256 images, 100,000 images are evaluated, 12.8 trained for each. kNN: 1.28M features of 1,024
dimensions, float16 as they are kept; the memory is what the process takes beyond them.

  python benchmarks/evaluation.py DATA       where DATA holds labelled shards in train/ and val/
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import RESULTS, machine, publish

from nepa_scale.config import DataConfig
from nepa_scale.data import ShardSet
from nepa_scale.evaluation.knn import knn_top1
from nepa_scale.training.run_folder import read_json_lines

TRAIN = Path(__file__).resolve().parents[1] / "nepa_scale" / "train.py"
TRAINED_PER_EVALUATED = 12.8
BATCH = 64
MODEL = ["model.width=128", "model.depth=4", "model.heads=4", "model.patch_size=8", "model.image_size=64"]


def share(data: Path, size: list[str]) -> dict[str, float]:
    """What two evaluations take of the time from the first step to the end; the bank is as large as val."""
    queries = len(ShardSet.open(str(data / "val"), DataConfig()))
    every = round(TRAINED_PER_EVALUATED * 2 * queries / BATCH)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [
            *size, f"data.train={data / 'train'}", f"data.val={data / 'val'}", "data.workers=1", "ema.decay=0.9999",
            f"train.steps={2 * every}", "schedule.warmup_steps=10", f"train.global_batch_size={BATCH}",
            "train.precision=fp32", f"evaluate.every={every}", f"evaluate.bank={queries}",
            f"evaluate.batch_size={BATCH}",
            "checkpoint.every=0", f"output={run}",
        ]  # fmt: skip
        subprocess.run([sys.executable, str(TRAIN), *settings], check=True, stdout=subprocess.DEVNULL)
        rows = read_json_lines(run / "metrics.jsonl")
    evaluations = [row["evaluation_seconds"] for row in rows if "evaluation_seconds" in row and row["step"] > 0]
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    training = sum(steps) / len(steps) * 2 * every
    return {
        "evaluation_seconds": sum(evaluations),
        "training_seconds": training,
        "share": sum(evaluations) / (training + sum(evaluations)),
    }


def knn_at_scale(bank: int, width: int, queries: int) -> dict[str, float]:
    values = torch.empty(bank, width, dtype=torch.float16)
    for part in values.split(65536):
        part.copy_(torch.randn(part.shape))
    labels = torch.arange(bank) % 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    found = knn_top1(values, labels, values[:queries], labels[:queries], classes=1000)
    seconds = time.monotonic() - began
    assert found > 0.99  # each is its own neighbour, with by far the most weight
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "bank_bytes": values.nbytes,
        "bytes_beyond": beyond * 1024,
        "queries_per_second": queries / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="labelled shards in train/ and val/")
    parser.add_argument("--bank", type=int, default=1_281_167, help="features among which kNN seeks")
    parser.add_argument("--json", type=Path, default=RESULTS / "evaluation.json", help="where the numbers go")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", help="of the model that is trained", default=MODEL)
    arguments = parser.parse_args()
    knn = knn_at_scale(arguments.bank, 1024, 1000)
    run = share(arguments.data, arguments.set)
    table = "\n".join(
        [
            f"`python benchmarks/evaluation.py`, {machine()}.",
            "",
            "| | |",
            "|---|---:|",
            f"| share of a run's time, evaluating 1 image for {TRAINED_PER_EVALUATED} trained | {run['share']:.1%} |",
            f"| kNN over {arguments.bank:,} features of 1,024: memory beyond theirs "
            f"({knn['bank_bytes'] / 2**30:.2f} GiB) | {knn['bytes_beyond'] / 2**20:,.0f} MiB |",
            f"| the same: queries a second | {knn['queries_per_second']:,.0f} |",
            "",
        ]
    )
    publish(arguments.json, {"machine": machine(), "training": run, "knn": knn}, table)


if __name__ == "__main__":
    main()
