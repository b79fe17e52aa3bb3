"""How fast a run's training step is on this machine, and where its time goes; or its data stream alone.

The step is the run's own: model, strategy, precision, batch, optimiser, moving average. With data.train set images come
from the run's stream, without it (data.train=null) from memory. Untimed steps come first; rates are medians, with their
spread. The split into phases is of further steps that wait for the device after every phase. MFU and HFU are model and
hardware FLOPs over the peak of a known device; null where it is not known, unless --measured-peak times a product here.
Start it with torchrun or deepspeed for several ranks.

--data-only reads the training shards as training would, but does not train. One process alone gives the rate of a core
and the share of each stage: reading, decoding, resizing, the rest.

examples:
  python tools/throughput.py --config configs/pretrain/demo.yaml data.train=null
  python tools/throughput.py --config configs/pretrain/vit_b14.yaml --compare compile=true,false --plot steps.png
  torchrun --nproc_per_node 8 tools/throughput.py --config configs/pretrain/vit_l14.yaml strategy=fsdp --trace step.json
  python tools/throughput.py --config configs/pretrain/demo.yaml --data-only
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from nepa_scale.command_line import Parser, deliver, positive, run
from nepa_scale.config import Config, ConfigError, load_config
from nepa_scale.data import ShardSet
from nepa_scale.models import resolve_architecture, size_name
from nepa_scale.profiling.data_rate import DataRate, measure_data_rate, to_facts
from nepa_scale.profiling.throughput import Throughput, measure_throughput
from nepa_scale.profiling.throughput_report import describe, draw
from nepa_scale.sharding import join_world, leave_world
from nepa_scale.training.departure import depart


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.yaml", help="of the run")
    parser.add_argument("--ds_config", type=Path, metavar="FILE.json", help="DeepSpeed JSON, as for train.py")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="timed (default: 10)")
    parser.add_argument("--warmup", type=positive, default=3, metavar="N", help="untimed, first (default: 3)")
    parser.add_argument(
        "--compare", action="append", default=[], metavar="KEY=A,B", help="once with each value; several multiply"
    )
    parser.add_argument("--measured-peak", action="store_true", help="where the peak is not known, time a product")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="Chrome trace of two steps; GPU: and memory")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the phases of the step")
    parser.add_argument("--data-only", action="store_true", help="the data stream, without a model")
    data = parser.add_argument_group("with --data-only")
    data.add_argument("--batch", type=positive, default=64, metavar="N", help="images of a batch (default: 64)")
    data.add_argument("--batches", type=positive, default=30, metavar="N", help="in each round (default: 30)")
    data.add_argument("--rounds", type=positive, default=5, metavar="N", help="medians are over so many (default: 5)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the YAML")
    parser.add_argument("--json", metavar="FILE", help="write the same facts as one JSON object; - for stdout")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    multiprocessing.set_forkserver_preload(["nepa_scale.data"])
    return data_only(arguments) if arguments.data_only else steps(arguments)


def steps(arguments: argparse.Namespace) -> int:
    """Times the training step, once for each combination of the compared values."""
    variants = [
        (label, load_config(arguments.config, [*arguments.overrides, *keys]))
        for label, keys in combinations(arguments.compare)
    ]
    world = join_world(variants[0][1].train.timeout)
    try:
        found: list[tuple[str, Throughput]] = []
        for label, config in variants:
            trace = arguments.trace if len(variants) == 1 or not arguments.trace else _numbered(arguments, len(found))
            result = measure_throughput(
                config, world, ds_config=arguments.ds_config, steps=arguments.steps, warmup=arguments.warmup,
                measured_peak=arguments.measured_peak, trace=trace,
            )  # fmt: skip
            found.append((label, result))
        if world.is_main:
            _report(arguments, found, variants[0][1])
    finally:
        leave_world()
    return 0


def _report(arguments: argparse.Namespace, found: list[tuple[str, Throughput]], config: Config) -> None:
    if arguments.plot:
        draw(found, size_name(resolve_architecture(config.model)), arguments.plot)
    facts: dict[str, Any] = found[0][1].to_json()
    if arguments.compare:
        facts = {"compared": [{"variant": label, **result.to_json()} for label, result in found]}
    deliver(facts, "\n\n".join(describe(label, result) for label, result in found), arguments.json)


def combinations(compared: list[str]) -> list[tuple[str, list[str]]]:
    """["a=1,2", "b=3,4"] -> four labels with the overrides that make them."""
    choices = []
    for option in compared:
        key, separator, values = option.partition("=")
        if not separator or not values:
            raise ConfigError(f"--compare {option} must be written key=value,value")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [(" ".join(keys), list(keys)) for keys in itertools.product(*choices)]


def _numbered(arguments: argparse.Namespace, index: int) -> Path:
    path: Path = arguments.trace
    return path.with_name(f"{path.stem}_{index}{path.suffix}")


def data_only(arguments: argparse.Namespace) -> int:
    """Times the data stream."""
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
    deliver(to_facts(rate), describe_data(rate), arguments.json)
    return 0


def describe_data(rate: DataRate) -> str:
    low, high = rate.spread
    lines = [
        f"{rate.images_per_second:,.0f} images/s with {rate.workers} workers ({low:,.0f} - {high:,.0f})",
        f"{rate.images_per_second_per_core:,.0f} images/s of one process alone:",
        *(f"  {stage:<8}{share:>6.1%}" for stage, share in rate.stages.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")) > 0:  # one rank speaks
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    depart(run(main))
