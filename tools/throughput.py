"""How fast a run's data stream is on this machine, and where its time goes.

Reads the training shards of the configuration as training would, with its workers, image size and crops, but does not
train. One process alone gives the rate of a core and the share of each stage: reading, decoding, resizing, the rest.

examples:
  python tools/throughput.py --config configs/pretrain/demo.yaml --data-only
  python tools/throughput.py --config configs/pretrain/vit_b14.yaml --data-only data.workers=8 --json data_rate.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

from nepa_scale.config import ConfigError, load_config
from nepa_scale.data import ShardSet
from nepa_scale.models import resolve_architecture
from nepa_scale.profiling.arguments import Parser, deliver, positive, run
from nepa_scale.profiling.data_rate import DataRate, measure_data_rate, to_facts


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.yaml", help="of the run")
    parser.add_argument("--data-only", action="store_true", required=True, help="the data stream, without a model")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="images of a batch (default: 64)")
    parser.add_argument("--batches", type=positive, default=30, metavar="N", help="in each round (default: 30)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="medians are over so many (default: 5)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the YAML")
    parser.add_argument("--json", metavar="FILE", help="write the same facts as one JSON object; - for stdout")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    multiprocessing.set_forkserver_preload(["nepa_scale.data"])
    config = load_config(arguments.config, arguments.overrides)
    if config.data.train is None:
        raise ConfigError("data.train is not set: give shards with data.train=FOLDER")
    rate = measure_data_rate(
        ShardSet.open(config.data.train, config.data),
        config.data,
        resolve_architecture(config.model).image_size,
        batch_size=arguments.batch,
        batches=arguments.batches,
        rounds=arguments.rounds,
        seed=config.train.seed,
    )
    deliver(to_facts(rate), describe(rate), arguments.json)
    return 0


def describe(rate: DataRate) -> str:
    low, high = rate.spread
    lines = [
        f"{rate.images_per_second:,.0f} images/s with {rate.workers} workers ({low:,.0f} - {high:,.0f})",
        f"{rate.images_per_second_per_core:,.0f} images/s of one process alone:",
        *(f"  {stage:<8}{share:>6.1%}" for stage, share in rate.stages.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
