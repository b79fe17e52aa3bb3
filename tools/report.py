"""Writes one self-contained HTML page about a set of runs, and each of its figures as PNG and SVG beside it.

RUNS are run folders, or folders that hold them, such as the output of a sweep. Runs that are under way, have failed, or
lack some metrics are shown with what they have. The page needs no network and no file beside it: mail it, or open it
where you like. It shows what was run, curves, their frontier, scaling laws with intervals (or why the runs determine
none), cost by size, collapse diagnostics, failures, and where the numbers come from. Where the runs repeat rows of the
published ablations, their tables are printed, too, beside what is published.

examples:
  python tools/report.py runs/sweeps/demo --output report.html
  python tools/report.py runs/sweeps/ablations_small --output ablations.html
  python tools/report.py runs/recipe_a runs/recipe_b --title "Two recipes" --output out/recipes.html --json facts.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import rich.box
import rich.progress
import rich.table
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from nepa_scale.command_line import Parser, deliver, run
from nepa_scale.scaling.recorded_runs import read_recorded_runs
from nepa_scale.scaling.report import Progress, figures_folder, make_report, write_report
from nepa_scale.scaling.report_page import Table


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders of run folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (default: report.html); figures go to FILE_figures/")  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: from the folders' names)")
    parser.add_argument("--bootstrap", type=whole, default=200, metavar="N",
                        help="resamplings for the laws' intervals (default: 200; 0: none)")  # fmt: skip
    parser.add_argument("--with-changed", action="store_true",
                        help="laws and frontiers also of runs whose settings changed under way")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write what the page says as one JSON object; - for stdout")
    return parser.parse_args()


def whole(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word} must be a whole number, at least 0")
    return int(word)


def main() -> int:
    arguments = parse()
    with progress_bar() as progress:
        progress("reading the runs", 0.0)
        runs = read_recorded_runs(arguments.runs)
        title = arguments.title or f"Runs of {', '.join(path.resolve().name for path in arguments.runs[:3])}"
        report = make_report(runs, title, progress, arguments.bootstrap, arguments.with_changed)
        facts = write_report(report, arguments.output, progress)
    shown = "".join(as_text(one.shown(), one.table.title) for one in report.ablations)
    said = f"{facts['page']}: {len(runs)} runs, {facts['bytes'] / 1e6:.1f} MB; {len(facts['files'])} figure files"
    deliver(facts, f"{shown}{said} in {figures_folder(arguments.output)}", arguments.json)
    return 0


def as_text(table: Table, title: str) -> str:
    shown, console = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), Console(width=160)
    for number, cell in enumerate(table.head):
        side: JustifyMethod = "right" if cell.kind == "number" else "left"
        shown.add_column(cell.text, justify=side, overflow="fold", no_wrap=number == 0)
    for line in table.body:
        shown.add_row(*("\n".join(filter(None, (cell.text, cell.interval))) for cell in line))
    with console.capture() as text:
        console.print(shown)
    return text.get()


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """What is being done: a bar on a terminal, elsewhere a line now and then; on stderr."""
    console, said = Console(stderr=True), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=1.0)

    def progress(doing: str, share: float) -> None:
        nonlocal said
        bar.update(task, description=doing, completed=share)
        if not console.is_terminal and time.monotonic() - said > 5:
            said = time.monotonic()
            print(doing, file=sys.stderr)

    with bar:
        yield progress


if __name__ == "__main__":
    sys.exit(run(main))
