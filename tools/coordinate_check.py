"""Shows whether initialisation and learning rates transfer between sizes: do activations keep their scale?

Trains for a few steps at each size, with the rates the same for all and with them transferred from the smallest
(model.base_width: muP; model.base_depth: CompleteP), and reports how the root mean square of the activations grows:
the slope of its logarithm over that of the size. Near 0 for all of them, transfer works.

examples:
  python tools/coordinate_check.py
  python tools/coordinate_check.py --along depth --sizes 2 4 8 16 --plot depth.png
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from nepa_scale.command_line import Parser, add_result_options, deliver, positive, run
from nepa_scale.config import ConfigError
from nepa_scale.scaling.coordinate_check import HEAD, CoordinateCheck, coordinate_check, plot_coordinates

SIZES = {"width": [64, 128, 256, 512], "depth": [2, 4, 8, 16]}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--along", choices=list(SIZES), default="width", help="what grows (default: width)")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="default: 64 to 512, or 2 to 16")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="of training (default: 10)")
    parser.add_argument("--seeds", type=positive, default=2, metavar="N", help="averaged over (default: 2)")
    add_result_options(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    sizes = sorted(set(arguments.sizes or SIZES[arguments.along]))
    if len(sizes) < 2:
        raise ConfigError("--sizes needs two or more: a slope is sought")
    if arguments.along == "width" and any(size % HEAD for size in sizes):
        raise ConfigError(f"--sizes {' '.join(map(str, sizes))}: widths must be multiples of {HEAD}, a head's")
    checks = [
        coordinate_check(
            sizes, along=arguments.along, transferred=transferred, steps=arguments.steps, seeds=arguments.seeds
        )
        for transferred in (False, True)
    ]
    if arguments.plot:
        plot_coordinates(arguments.plot, checks)
    facts = {"checks": [dataclasses.asdict(check) | {"steepest": check.steepest} for check in checks]}
    deliver(facts, describe(*checks), arguments.json)
    return 0


def describe(same: CoordinateCheck, transferred: CoordinateCheck) -> str:
    sizes = ", ".join(str(size) for size in same.sizes)
    lines = [f"slope over {same.along} {sizes}", f"{'':<24}{'same rates':>12}{'transferred':>13}"]
    for name, slope in same.slopes.items():
        lines.append(f"  {name:<22}{slope:>+12.3f}{transferred.slopes[name]:>+13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
