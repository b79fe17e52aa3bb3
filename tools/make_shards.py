"""Makes WebDataset shards from images, and checks shards.

INPUT is one of
  a folder with a folder for each class       images/n01440764/*.JPEG (labels: sorted folder names, as ImageNet's are)
  a folder of images alone                    unlabelled, for pretraining
  ILSVRC2012_img_train.tar                    ImageNet's training set as it is downloaded, with its nested tars
  ILSVRC2012_img_val.tar                      its validation set; labels from ILSVRC2012_devkit_t12.tar.gz beside it
  parquet files of a Hugging Face export      'data/train-*.parquet' (needs pyarrow)
  shards                                      a folder of tars, a brace pattern, URLs: shuffled and sharded anew

OUTPUT is a folder: shard-000000.tar ..., an index beside each, and dataset.json with counts, classes and checksums.
The same input, settings and seed give the same bytes, with any number of workers. A run that was killed goes on where
it stopped when the same command is given again.

examples:
  python tools/make_shards.py ~/imagenet/train data/imagenet/train --workers 16
  python tools/make_shards.py ILSVRC2012_img_val.tar data/imagenet/val --resize 256 --quality 90
  python tools/make_shards.py data/imagenet/train --verify        re-reads and decodes everything; exit 1 if damaged
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from nepa_scale.config import EXIT_USAGE, ConfigError
from nepa_scale.data.shard_maker import SAMPLES_PER_SHARD, make_shards
from nepa_scale.data.verify import verify

EXIT_FAILURE = 1
SHOWN = 20  # problems printed; all of them are in --json


def main() -> int:
    arguments = _parser().parse_args()
    multiprocessing.set_forkserver_preload(["nepa_scale.data.shard_maker", "nepa_scale.data.verify"])
    if arguments.output is None and not arguments.verify:
        raise ConfigError("give INPUT and OUTPUT, or a folder of shards with --verify (see --help)")
    facts: dict[str, Any] = {}
    if arguments.output is not None:
        facts |= _make(arguments)
    problems = _verify(arguments.output or arguments.input, arguments.workers, facts) if arguments.verify else []
    if arguments.json == "-":
        print(json.dumps(facts))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(facts) + "\n")
    return EXIT_FAILURE if problems else 0


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    made = make_shards(
        arguments.input,
        arguments.output,
        samples_per_shard=arguments.samples_per_shard,
        resize=arguments.resize,
        quality=arguments.quality,
        workers=arguments.workers,
        seed=arguments.seed,
        devkit=arguments.devkit,
        class_list=arguments.classes,
    )
    facts = {
        "output": arguments.output,
        "samples": sum(shard.samples for shard in made.shards),
        "shards": len(made.shards),
        "classes": made.classes,
        "bytes": sum(shard.bytes for shard in made.shards),
        "left_out": made.left_out,
        "seconds": time.monotonic() - start,
    }
    _say(
        f"{facts['samples']:,} samples of {facts['classes'] or 'no'} classes in {facts['shards']} shards, "
        f"{facts['bytes'] / 1e9:.3g} GB, in {facts['seconds']:.1f} s: {arguments.output}"
    )
    for key, why in made.left_out[:SHOWN]:
        _say(f"left out: {key}: {why}")
    return facts


def _verify(folder: str, workers: int | None, facts: dict[str, Any]) -> list[Any]:
    checked = verify(folder, workers)
    facts["verified"] = {"samples": checked.samples, "problems": [problem._asdict() for problem in checked.problems]}
    for problem in checked.problems[:SHOWN]:
        _say(f"{problem.shard}: {problem.key + ': ' if problem.key else ''}{problem.why}")
    if len(checked.problems) > SHOWN:
        _say(f"... and {len(checked.problems) - SHOWN} more")
    _say(f"verified {checked.samples:,} samples: {len(checked.problems) or 'no'} problems")
    return checked.problems


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="images, or with --verify alone a folder of shards")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="default %(default)s")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side; smaller images keep their bytes")
    parser.add_argument("--quality", type=int, help="of JPEGs that are encoded again, 1-100 (90 with --resize)")
    parser.add_argument("--workers", type=int, help="processes; default: one for each core")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle; default %(default)s")
    parser.add_argument("--devkit", type=Path, help="ImageNet's devkit, a folder or .tar.gz, for the val tar")
    parser.add_argument(
        "--classes", type=Path, help="names in label order, for a folder that lacks some: a text file or dataset.json"
    )
    parser.add_argument("--verify", action="store_true", help="re-read all shards and name what is wrong (exit 1)")
    parser.add_argument("--json", metavar="FILE", help="write the facts as JSON to FILE (-: stdout)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except (OSError, RuntimeError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        print("make_shards: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
