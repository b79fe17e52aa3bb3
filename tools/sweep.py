"""Runs a grid of sizes and compute budgets, to fit scaling laws to.

SWEEP is a file such as configs/sweeps/demo.yaml. Each run is train.py, as a user would start it, in a folder named by
what determines it: give the same command again after a stop, and finished runs are skipped, others go on where they
were. A run that fails is tried once more, then shown. Ctrl-C, or a TERM signal, lets the runs under way save and end.

examples:
  python tools/sweep.py configs/sweeps/demo.yaml --dry-run
  python tools/sweep.py configs/sweeps/demo.yaml --jobs 2
  python tools/sweep.py configs/sweeps/demo.yaml --gpus 0 1 2 3
  python tools/sweep.py configs/sweeps/demo.yaml --launcher "torchrun --standalone --nproc_per_node 8"
  python tools/sweep.py configs/sweeps/demo.yaml --slurm sweep.sh
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from nepa_scale.command_line import Parser, deliver, positive, run
from nepa_scale.scaling.sweep import (
    PlannedRun,
    default_launcher,
    measured_rate,
    plan_runs,
    read_sweep,
    run_all,
    slurm_array,
)
from nepa_scale.training.progress import format_duration

EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130
QUALITY = ("loss", "one_plus_loss", "effective_rank", "knn_top1", "probe_top1", "top1", "weights")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their cost, and start none")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--gpus", nargs="+", metavar="GPU", help="one run at a time on each of these")
    parser.add_argument(
        "--rate", type=float, metavar="TFLOP/S", help="of a run, for its predicted time (default: as runs so far)"
    )
    parser.add_argument("--launcher", metavar="COMMAND", help="what comes before train.py (default: this Python)")
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="write a job array for sbatch, and start none")
    parser.add_argument("--json", metavar="FILE", help="write the runs as one JSON object; - for stdout")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    runs = plan_runs(read_sweep(arguments.sweep))
    launcher = shlex.split(arguments.launcher) if arguments.launcher else default_launcher()
    failed: dict[str, str] = {}
    if arguments.slurm:
        arguments.slurm.write_text(slurm_array(runs, launcher))
    elif not arguments.dry_run:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first is ignored in a shell's background, unless asked for
            signal.signal(number, signal.default_int_handler)
        try:
            slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in arguments.gpus or ()] or [{}] * arguments.jobs
            failed = go(runs, launcher, slots)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return EXIT_INTERRUPTED
    rate = arguments.rate * 1e12 if arguments.rate else measured_rate(runs)
    found = {"runs": [facts(one, rate) for one in runs], "failed": failed}
    deliver(found, describe(runs, failed, rate), arguments.json)
    return EXIT_FAILURE if failed else 0


def go(runs: list[PlannedRun], launcher: list[str], slots: list[dict[str, str]]) -> dict[str, str]:
    """Runs them under a live table on a terminal, with a line now and then elsewhere."""
    console, began, said = Console(stderr=True), time.monotonic(), 0.0
    before = sum(one.flops for one in runs if one.finished())
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def report(active: list[PlannedRun]) -> None:
            nonlocal said
            done = sum(one.flops for one in runs if one.finished())
            done += sum(min(float(one.last_row().get("flops_seen", 0)), one.flops) for one in active)
            rate = (done - before) / (time.monotonic() - began)
            total = sum(one.flops for one in runs)
            left = f"{(total - done) / rate / 60:.0f} min left" if rate > 0 else ""
            line = f"{sum(one.finished() for one in runs)} of {len(runs)} runs, {done / total:.0%} of the FLOPs, {left}"
            if console.is_terminal:
                live.update(table(runs, {one.name for one in active}, line), refresh=True)
            elif time.monotonic() - said > 30:
                said = time.monotonic()
                print(line, file=sys.stderr)

        return run_all(runs, launcher, slots, report)


def facts(one: PlannedRun, rate: float | None) -> dict[str, Any]:
    row = one.last_row()
    return {
        "name": one.name,
        "folder": str(one.folder),
        "parameters": one.parameters,
        "steps": one.steps,
        "samples": one.samples,
        "flops": one.flops,
        "predicted_hours": one.flops / rate / 3600 if rate else None,
        "finished": one.finished(),
        "settings_changed": one.mixed() or None,
        **{key: row[key] for key in QUALITY if key in row},
    }


def table(runs: list[PlannedRun], active: set[str], title: str, rate: float | None = None) -> Table:
    shown, rows = Table(title=title), [one.last_row() for one in runs]
    known = [key for key in QUALITY if any(key in row for row in rows)]
    for heading in ("run", "parameters", "images", "FLOPs", "time", "state", *known):
        shown.add_column(heading, justify="left" if heading in ("run", "state") else "right", overflow="fold")
    for one, row in zip(runs, rows, strict=True):
        state = "finished" if one.finished() else f"step {row.get('step', 0)}" if one.name in active else ""
        quality = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key) or "") for key in known]
        time_needed = format_duration(one.flops / rate) if rate else ""
        figures = (f"{one.parameters:,}", f"{one.samples:,}", f"{one.flops:.2g}", time_needed)
        shown.add_row(one.name, *figures, state, *quality)
    return shown


def describe(runs: list[PlannedRun], failed: dict[str, str], rate: float | None) -> str:
    console = Console(width=130)
    total = sum(one.flops for one in runs)
    cost = f", {total / rate / 3600:.2g} hours of one run's devices" if rate else ""
    with console.capture() as text:
        console.print(table(runs, set(), f"{len(runs)} runs, {total:.3g} FLOPs{cost}", rate))
    changed = "".join(f"{one.name} is not as it was planned: {why}\n" for one in runs if (why := one.mixed()))
    return text.get() + changed + "".join(f"failed: {name}: {why}\n" for name, why in failed.items())


if __name__ == "__main__":
    sys.exit(run(main))
