"""FLOPs of a model: by module, forward, backward and optimiser, of an image, a step and a run.

Four counts of the forward pass stand side by side: the closed form, torch's FlopCounterMode, fvcore and DeepSpeed's
profiler; they agree to the FLOP. A multiply-add is 2 FLOPs; products, patch embedding and attention count, element-wise
work does not. Attention counts in full; the halved figures give causal attention half. Model FLOPs are forward and
backward; hardware FLOPs add what is computed twice: recomputed activations and, in a fused attention kernel's backward
pass, the scores. MFU is the rate of the former over the peak, HFU of the latter.

With --objective mae or jepa, what they have beside the backbone counts too; of the other counters torch's alone counts
along, over the whole training step (docs/objectives.md).

examples:
  python tools/flops.py --size vit_b --patch-size 16
  python tools/flops.py --size vit_g --activation-checkpointing full --global-batch 4096 --images 1025000000
  python tools/flops.py --all --plot flops.png --table docs/sizes.md
  python tools/flops.py --objective mae
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

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
from nepa_scale.config import CHOICES, ObjectiveConfig
from nepa_scale.models import SIZES
from nepa_scale.profiling import count_flops
from nepa_scale.profiling.counters import count_all, torch_pretext
from nepa_scale.profiling.flops import PARTS, RECOMPUTE, FlopCount
from nepa_scale.profiling.flops_report import describe, draw, sizes_table


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--all", action="store_true", help="every size in place of one")
    parser.add_argument(
        "--activation-checkpointing", type=choice("--activation-checkpointing", RECOMPUTE), default="none",
        help="none | selective | full: what the backward pass computes again (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", type=choice("--objective", CHOICES["objective.name"]), default="next_embedding",
        help="what is pretrained with: next_embedding (default) | mae | jepa",
    )  # fmt: skip
    parser.add_argument("--bidirectional", action="store_true", help="attention is not causal: nothing is halved")
    parser.add_argument("--global-batch", type=positive, default=4096, metavar="N", help="images a step (4096)")
    parser.add_argument("--images", type=positive, metavar="N", help="images of the whole run: epochs x samples")
    parser.add_argument("--no-counters", action="store_true", help="the closed form alone, at once")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="with --all: write the table of the sizes")
    add_result_options(parser)
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse()
    counts = [_count(arguments, size) for size in (SIZES if arguments.all else [arguments.size])]
    facts = [_facts(count, not arguments.no_counters) for count in counts]
    text = "\n\n".join(describe(count, fact["counters"]) for count, fact in zip(counts, facts, strict=True))
    if arguments.table:
        command = "python tools/flops.py " + " ".join(a for a in sys.argv[1:])
        arguments.table.write_text(sizes_table(counts, command))
    if arguments.plot:
        draw(counts, arguments.plot)
    deliver({"sizes": facts} if arguments.all else facts[0], text, arguments.json)
    return 0


def _count(arguments: argparse.Namespace, size: str) -> FlopCount:
    model = dataclasses.asdict(model_of(arguments, size))
    return count_flops(
        **model,
        objective=ObjectiveConfig(name=arguments.objective),
        causal=not arguments.bidirectional,
        recompute=arguments.activation_checkpointing,
        global_batch_size=arguments.global_batch,
        images=arguments.images,
    )


def _facts(count: FlopCount, counters: bool) -> dict[str, Any]:
    if count.objective.name != "next_embedding":
        step = torch_pretext(count.architecture, count.objective, count.recompute) if counters else None
        closed = {"closed_form": count.flops_per_image}
        return count.to_json() | {"counters": closed | ({"torch": step.forward} if step else {})}
    found = {"closed_form": count.forward} | (count_all(count.architecture) if counters else {})
    return count.to_json() | {
        "counters": {name: sum(parts.values()) for name, parts in found.items()},
        "counters_by_module": {name: {part: parts[part] for part in PARTS} for name, parts in found.items()},
    }


if __name__ == "__main__":
    sys.exit(run(main))
