"""Pictures and numbers of what a trained model looks at, and of what it predicts.

  attention   what chosen patches attend to, by layer and head, over the image; how far each head looks
  similarity  where in the image a prediction finds the next patch's embedding; how often it finds the right one

Each writes a folder with a PNG for each of some images and an index.html that shows them, and prints a table of numbers
over all images. `visualize.py attention --help` and `visualize.py similarity --help` explain the options.

examples:
  python tools/visualize.py attention runs/demo data/demo/val --query 2,3
  python tools/visualize.py similarity runs/demo val=data/demo/val other=my/photographs --pictures 20 --json result.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nepa_scale.analysis.attention_report import AttentionReport, describe_attention
from nepa_scale.analysis.gallery import INDEX, Viewing, write_gallery
from nepa_scale.analysis.images import Framing, ImageSet
from nepa_scale.analysis.similarity_report import SimilarityReport, describe_similarity
from nepa_scale.command_line import Parser, deliver, positive, run, sides
from nepa_scale.config import Config, ConfigError
from nepa_scale.evaluation.loading import attends_causally, load_any, source_of
from nepa_scale.models import Architecture
from nepa_scale.objectives import Classifier, NextEmbedding
from nepa_scale.training.weights import KINDS, WEIGHTS_HELP

ATTENTION = """What chosen patches attend to, laid over the image: by layer (mean over heads), and by layer and head.

Only the rows of the attention matrix that are asked for are formed, layer by layer, so that large images fit. Measured
over --sampled random patches of each image: the mean distance of what is attended to, in patches and as a share of the
image's diagonal; the entropy of the weights; the weight on CLS; beside them what uniform attention, which weighs all
visible patches alike, would have. docs/visualize.md defines them.

examples:
  python tools/visualize.py attention runs/vit_b14 photographs/ --query 8,8 12,3
  python tools/visualize.py attention runs/vit_b14_in1k val=data/imagenet/val --limit 1000 --json attention.json
  python tools/visualize.py attention runs/vit_b14 cat.jpg --bidirectional --image-size 448 --whole
"""
SIMILARITY = """The cosine of a prediction with the embedding of each patch of its image, at chosen patches.

Pictures mark the patch, the next one, which is to be predicted, and the nearest; beside the prediction's map is that of
the patch's own embedding, which is what copying gives. Measured over every patch that has a next one: the rank of the
true next patch among all patches of the image and among those not yet seen, against copying, the mean of the patches
seen so far, and chance. docs/visualize.md defines them. CKPT must be pretrained by next-embedding prediction.

examples:
  python tools/visualize.py similarity runs/vit_b14 photographs/ --query 8,8
  python tools/visualize.py similarity runs/vit_b14 val=data/imagenet/val coco=data/coco/val2017 --json similarity.json
"""
DESCRIBE = {"attention": describe_attention, "similarity": describe_similarity}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="attention | similarity")
    attention = commands.add_parser("attention", description=ATTENTION)
    _add_common(attention, "the centre and the last")
    attention.add_argument(
        "--sampled", type=positive, default=16, metavar="N", help="patches of each image measured (default: 16)"
    )
    kind = attention.add_mutually_exclusive_group()
    kind.add_argument("--causal", action="store_true", default=None, help="attention to what came before only")
    kind.add_argument(
        "--bidirectional", dest="causal", action="store_false", help="to all patches (default: as it was trained)"
    )
    similarity = commands.add_parser("similarity", description=SIMILARITY)
    _add_common(similarity, "the centre and the last but one")
    similarity.set_defaults(causal=None)
    return parser.parse_args()


def _add_common(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a run folder, a checkpoint, an official folder")
    parser.add_argument(
        "images", nargs="+", metavar="[NAME=]IMAGES", help="an image, a folder or shards: a set each, named or not"
    )
    parser.add_argument(
        "--query", type=_place, nargs="+", action="extend", default=[], metavar="ROW,COL",
        help=f"patches, counted from 0,0 at the upper left (default: {default})",
    )  # fmt: skip
    parser.add_argument("--pictures", type=_count, default=8, metavar="N", help="images of each set drawn (default: 8)")
    parser.add_argument("--limit", type=positive, metavar="N", help="images of each set measured (default: all)")
    parser.add_argument(
        "--image-size", type=sides, metavar="S|HxW", help="pixels: 224, or 224x448 (default: as it was trained)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="keep all of each image, its shorter side resized; else the middle is cut"
    )
    parser.add_argument("--weights", choices=list(KINDS), help=WEIGHTS_HELP)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: visualized/attention or similarity)")
    parser.add_argument("--json", metavar="FILE", help="write the same facts as one JSON object; - for stdout")


def _count(word: str) -> int:
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word} must be a whole number, at least 0")
    return int(word)


def _place(word: str) -> tuple[int, int]:
    numbers = word.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{word} must be ROW,COL: two whole numbers from 0, such as 3,5")
    return int(numbers[0]), int(numbers[1])


def main() -> int:
    arguments = parse()
    facts, text = visualize(arguments)
    deliver(facts, text, arguments.json)
    return 0


def visualize(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Draws, measures and writes the gallery; returns what is reported, as facts and in words."""
    began = time.monotonic()
    loaded = load_any(arguments.checkpoint, arguments.weights)
    if loaded.note:
        print(loaded.note, file=sys.stderr)
    task, config = loaded.task.to("cuda" if torch.cuda.is_available() else "cpu"), loaded.config
    viewing = _viewing(arguments, task.backbone.architecture)
    causal = attends_causally(task) if arguments.causal is None else arguments.causal
    report: AttentionReport | SimilarityReport
    if arguments.command == "attention":
        report = AttentionReport(task.backbone, causal, viewing, arguments.sampled)
    else:
        report = SimilarityReport(_predicting(task, config, arguments.checkpoint), viewing)
    if viewing.output.exists() and not viewing.output.is_dir():
        raise ConfigError(f"--output {viewing.output} is a file: give the name of a folder")
    viewing.output.mkdir(parents=True, exist_ok=True)
    pictures, sets = report.draw(), report.measure()
    height, width = viewing.framing.size
    words = (
        f"{source_of(loaded.facts)}, {'causal' if causal else 'bidirectional'}, "
        f"{height} x {width} pixels{' (whole images: the shorter side)' if viewing.framing.whole else ''}"
    )
    text = f"{words}\n{DESCRIBE[arguments.command](sets)}"
    write_gallery(
        viewing.output,
        f"{arguments.command} of {arguments.checkpoint}",
        text,
        [(picture["file"], f"{picture['set']}: {picture['image']}") for picture in pictures],
    )
    facts = {
        "command": arguments.command,
        **loaded.facts,
        "causal": causal,
        "image_size": [height, width],
        "whole": viewing.framing.whole,
        "sets": sets,
        "pictures": pictures,
        "output": str(viewing.output),
        "seconds": time.monotonic() - began,
    }
    return facts, f"{text}\n{viewing.output / INDEX}: {len(pictures)} pictures, {facts['seconds']:.0f} s"


def _viewing(arguments: argparse.Namespace, architecture: Architecture) -> Viewing:
    size = arguments.image_size or list(architecture.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    return Viewing(
        [ImageSet.open(words) for words in arguments.images],
        Framing((height, width), architecture.patch_size, arguments.whole),
        arguments.query,
        arguments.pictures,
        arguments.limit,
        arguments.output or Path("visualized", arguments.command),
    )


def _predicting(task: NextEmbedding | Classifier, config: Config | None, checkpoint: Path) -> NextEmbedding:
    """The task, where its outputs are predictions of the next embedding."""
    if not isinstance(task, NextEmbedding):
        raise ConfigError(
            f"{checkpoint} is a classifier, whose outputs predict no embeddings any more: give the pretrained "
            "checkpoint that it came from"
        )
    if config is not None and config.objective.name != "next_embedding":
        raise ConfigError(f"{checkpoint} was trained by {config.objective.name}: it predicts no next embedding")
    if not task.objective.shift:
        raise ConfigError(
            f"{checkpoint} was trained with objective.shift=false: it predicts each patch's own embedding, not the "
            "next one's"
        )
    return task


if __name__ == "__main__":
    sys.exit(run(main))
