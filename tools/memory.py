"""Memory of the training step on its fullest rank, by component: for any strategy and number of ranks, without a GPU.

Predicted from closed formulas; --measure also runs the step (two ranks fit on a laptop) and sets it beside: on a CPU
the bytes of all live tensors, independent of the allocator, on a GPU torch.cuda.max_memory_allocated.

  parameters, gradients, masters (fp32), moments (AdamW's two), ema: as the strategy shards them
  activations: what autograd keeps; temporaries: what the fullest moment of the backward pass computes with
  communication: gathered parameters and the buckets in which gradients are reduced

examples:
  python tools/memory.py --size vit_g --strategy zero3 --world-size 8 --micro-batch 64
  python tools/memory.py --size vit_g --strategy all --world-size 8 --micro-batch 64 --plot memory.png
  python tools/memory.py --size vit_ti --strategy fsdp --world-size 2 --micro-batch 4 --precision fp32 --measure
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from nepa_scale.command_line import (
    Parser,
    add_model_options,
    add_result_options,
    choice,
    deliver,
    model_of,
    positive,
    run,
)
from nepa_scale.config import CHOICES
from nepa_scale.profiling.memory import check, predict
from nepa_scale.profiling.memory_report import describe, draw, facts_of
from nepa_scale.profiling.setup import Setup

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--strategy", type=choice("--strategy", (*STRATEGIES, "all")), default="ddp",
                        help="single | ddp | fsdp | zero1 | zero2 | zero3 | all (default: ddp)")  # fmt: skip
    parser.add_argument("--world-size", type=positive, default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument(
        "--micro-batch", type=positive, default=8, metavar="N", help="images of a forward pass (default: 8)"
    )
    modes = CHOICES["activation_checkpointing"]
    parser.add_argument("--activation-checkpointing", type=choice("--activation-checkpointing", modes), default="none",
                        help="none | selective | full (default: none)")  # fmt: skip
    parser.add_argument("--precision", type=choice("--precision", CHOICES["train.precision"]), default="bf16",
                        help="fp32 | bf16 (default: bf16)")  # fmt: skip
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="a moving average (yes)")
    parser.add_argument("--offload", action="store_true", help="zero3 with parameters and optimiser on the host")
    parser.add_argument("--measure", action="store_true", help="run the step here and compare")
    add_result_options(parser)
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    setup = Setup(
        model_of(arguments), arguments.strategy, arguments.world_size, arguments.micro_batch, arguments.precision,
        arguments.activation_checkpointing, arguments.ema, arguments.offload,
    )  # fmt: skip
    setups = [setup]
    if setup.strategy == "all":
        names = STRATEGIES if setup.world_size == 1 else STRATEGIES[1:]
        setups = [dataclasses.replace(setup, strategy=name) for name in names]
    predicted = [predict(one) for one in setups]
    measured = None
    if arguments.measure:
        from nepa_scale.profiling.memory_measured import measure

        for one in setups:
            check(one)
        measured = measure(setups)
    facts = [facts_of(one, None if measured is None else measured[i]) for i, one in enumerate(predicted)]
    if arguments.plot:
        draw(predicted, measured, arguments.plot)
    text = "\n\n".join(describe(fact) for fact in facts)
    deliver({"strategies": facts} if arguments.strategy == "all" else facts[0], text, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
