"""Given GPUs and a model: which strategies fit, how fast they are on paper, what the run costs, and how to start it.

The run is that of a configuration file: --config, or the one in configs/pretrain that has the model's name; what is
given beside it, and what the plan decides, goes over the file and is listed. For every strategy the fastest micro-batch
and recomputation that fit are sought; the fastest of all is recommended. The
step time is a roofline: its assumptions are printed with it and can be changed (--efficiency, --network, --link). It is
an estimate: measure with tools/throughput.py before buying. Exit status 1 where nothing fits, with what would have to
change.

examples:
  python tools/plan.py --gpus 8 --gpu h100 --size vit_g
  python tools/plan.py --gpus 64 --gpu h100 --size vit_7b --global-batch 4096 --slurm run.sbatch --plot plan.png
  python tools/plan.py --gpus 1 --gpu rtx4090 --config configs/pretrain/tiny_imagenet.yaml --samples 24999
  python tools/plan.py --scaling docs/images/scaling_out.png --gpu h100
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from nepa_scale.command_line import (
    Parser,
    add_model_options,
    add_result_options,
    choice,
    deliver,
    positive,
    run,
)
from nepa_scale.config import CHOICES
from nepa_scale.profiling.devices import DEVICES, find_device
from nepa_scale.profiling.launch_scripts import (
    Source,
    as_word,
    command,
    find_source,
    planned_changes,
    slurm_script,
)
from nepa_scale.profiling.plan import IMAGENET, Assumptions, Job, plan
from nepa_scale.profiling.plan_report import describe, describe_changes, draw, draw_scaling, facts_of, scaling_table
from nepa_scale.training.schedule import total_steps

EXIT_NOTHING_FITS = 1
SCALED_STRATEGIES = ("ddp", "fsdp", "zero2")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.set_defaults(size=None, patch_size=None, image_size=None, mlp=None)
    parser.add_argument("--config", type=Path, metavar="YAML", help="the run (default: that of the model)")
    parser.add_argument("--gpus", type=positive, default=8, metavar="N", help="in all (default: 8)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h100)")
    parser.add_argument("--gpus-per-host", type=positive, metavar="N", help="default: the usual server's, 8")
    parser.add_argument("--global-batch", type=positive, metavar="N", help="images a step (default: the file's)")
    parser.add_argument("--epochs", type=float, metavar="E", help="default: the file's")
    parser.add_argument("--samples", type=positive, default=IMAGENET, metavar="N", help="images (ImageNet-1k's)")
    parser.add_argument("--precision", type=choice("--precision", CHOICES["train.precision"]),
                        help="fp32 | bf16 (default: the file's)")  # fmt: skip
    parser.add_argument("--no-ema", action="store_true", help="without a moving average (default: the file's)")
    group = parser.add_argument_group("assumptions")
    group.add_argument("--efficiency", type=float, default=Assumptions.product_efficiency, metavar="X",
                       help=f"products, share of the peak (default: {Assumptions.product_efficiency})")  # fmt: skip
    group.add_argument("--overlap", type=float, default=Assumptions.overlap, metavar="X",
                       help=f"hidden communication, share of the backward pass ({Assumptions.overlap})")  # fmt: skip
    group.add_argument("--link", type=float, metavar="GB/S", help="of a GPU to others of its host, one direction")
    group.add_argument("--network", type=float, metavar="GB/S", help="of a GPU to other hosts, one direction")
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="write the recommended plan as an sbatch script")
    parser.add_argument("--scaling", type=Path, metavar="FILE.png", help="draw efficiency against GPUs, print it, stop")
    add_result_options(parser)
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    source = source_of(arguments)
    job = job_of(arguments, source)
    if arguments.scaling:
        draw_scaling(job.device, SCALED_STRATEGIES, job.assumptions, arguments.scaling)
        print(scaling_table(job.device, SCALED_STRATEGIES, job.assumptions))
        return 0
    choices = plan(job)
    best = choices[0] if choices[0].fits else None
    start = command(source, job, best) if best else None
    script = slurm_script(source, job, best) if best else None
    changes = planned_changes(source, job, best) if best else None
    text = describe(job, choices)
    if changes is not None:
        text += f"\n\n{describe_changes(source.name, changes)}\n\nrun it:\n  {start}"
    else:
        text += "\n\nnothing fits: see above what would have to change"
    if arguments.slurm and script:
        arguments.slurm.write_text(script)
    if arguments.plot and best:
        draw(job, choices, arguments.plot)
    deliver(facts_of(job, choices, source.name, changes, start, script), text, arguments.json)
    return 0 if best else EXIT_NOTHING_FITS


def source_of(arguments: argparse.Namespace) -> Source:
    """The configuration file, and the options over it."""
    given = {
        "model.image_size": arguments.image_size,
        "model.mlp": arguments.mlp,
        "train.global_batch_size": arguments.global_batch,
        "train.epochs": arguments.epochs,
        "train.precision": arguments.precision,
        "ema.decay": 0.0 if arguments.no_ema else None,
    }
    words = [f"{key}={as_word(value)}" for key, value in given.items() if value is not None]
    if arguments.epochs is not None:
        words.append("train.steps=null")
    if arguments.no_ema:
        words.append("ema.decay_end=null")
    return find_source(arguments.config, arguments.size, arguments.patch_size, [*words, *arguments.overrides])


def job_of(arguments: argparse.Namespace, source: Source) -> Job:
    changes = {"link": arguments.link, "network": arguments.network}
    device = dataclasses.replace(
        find_device(arguments.gpu),
        **{name: value * 1e9 for name, value in changes.items() if value is not None},
        **({"per_host": arguments.gpus_per_host} if arguments.gpus_per_host else {}),
    )
    config = source.wanted
    batch = config.train.global_batch_size
    return Job(
        model=config.model,
        gpus=arguments.gpus,
        device=device,
        global_batch=batch,
        epochs=config.train.epochs or total_steps(config, arguments.samples // batch) * batch / arguments.samples,
        samples=arguments.samples,
        precision=config.train.precision,
        ema=config.ema.decay > 0,
        assumptions=Assumptions(product_efficiency=arguments.efficiency, overlap=arguments.overlap),
    )


if __name__ == "__main__":
    sys.exit(run(main))
