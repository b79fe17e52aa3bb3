"""Where a benchmark's numbers go: results/NAME.json, its table in results/NAME.md, and all tables in RESULTS.md."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TITLES = {  # in the order of the page
    "data": "The data stream",
    "decoders": "Decoding and cropping",
    "checkpoint": "Checkpoints",
    "step": "The training step on a CPU",
    "gpu_check": "The training step on a GPU",
    "evaluation": "Evaluation",
    "memory": "Memory, predicted and measured",
}
INTRODUCTION = """# Benchmarks

Each table was written by the program it names, with everything it compares in one run on one machine; the numbers
behind it are in `results/*.json`. Ratios within a run carry over to other machines far better than rates do.
"""


def machine() -> str:
    """This one, in words."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"


def publish(path: Path, facts: Any, table: str) -> None:
    """Writes facts as JSON to `path` and the table (Markdown) beside it, prints that, and renews RESULTS.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    print(table)
    if path.parent == RESULTS:
        tables = {name: RESULTS / f"{name}.md" for name in TITLES}
        parts = [f"## {TITLES[name]}\n\n{file.read_text()}" for name, file in tables.items() if file.is_file()]
        (HERE / "RESULTS.md").write_text("\n".join([INTRODUCTION, *parts]))
