"""Prepares the demo's data: WebDataset shards of crops of photographs that ship inside scikit-image and matplotlib.

    python tools/make_demo_data.py                # data/demo/train, data/demo/val

A crop's label is its photograph; validation crops come from other parts of the photographs than training crops. Does
nothing where the data is already there, and makes it again where a shard is missing or cut short. What the photographs
are and their licences: nepa_scale/data/photographs.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from nepa_scale.config import EXIT_USAGE, ConfigError
from nepa_scale.data.photographs import PHOTOGRAPHS, shards_are_there, write_class_folders
from nepa_scale.data.shard_maker import make_shards

SPLITS = ("val", "train")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder (default: data/demo)")
    parser.add_argument("--train", type=int, default=500, help="training crops of each photograph (default: 500)")
    parser.add_argument("--val", type=int, default=60, help="validation crops of each photograph (default: 60)")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        if all(shards_are_there(arguments.output / split) for split in SPLITS):
            print(f"{arguments.output} is already there")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            print(f"cutting {(arguments.train + arguments.val) * len(PHOTOGRAPHS):,} crops ...", flush=True)
            write_class_folders(Path(folder), arguments.train, arguments.val)
            for split in SPLITS:
                make_shards(Path(folder) / split, arguments.output / split, samples_per_shard=1000, workers=1)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(f"made {arguments.output} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
