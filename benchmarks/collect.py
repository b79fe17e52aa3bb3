"""RESULTS.md from the tables that the benchmarks left in results/.

example:
  python benchmarks/data.py --images ~/imagenet/train && python benchmarks/collect.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
TITLES = {  # in the order of the page
    "data": "The data stream",
    "decoders": "Decoding and cropping",
    "checkpoint": "Checkpoints",
    "memory": "Memory, predicted and measured",
    "throughput": "The training step",
}
INTRODUCTION = """# Benchmarks

Each table was written by the program it names, with everything it compares in one run on one machine; the numbers
behind it are in `results/*.json`. Ratios within a run carry over to other machines far better than rates do.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for name, title in TITLES.items():
        table = HERE / "results" / f"{name}.md"
        if table.is_file():
            parts.append(f"## {title}\n\n{table.read_text()}")
    return "\n".join(parts)


def main() -> int:
    (HERE / "RESULTS.md").write_text(page())
    print(f"wrote {HERE / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
