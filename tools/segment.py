"""Linear semantic segmentation on the frozen features of a checkpoint: mIoU on a folder laid out as ADE20K is.

The head is batch norm and a 1x1 convolution on the maps of a few blocks, its logits upsampled bilinearly to the labels.
It is trained on random square crops, 1/2 to 1 of an image's shorter side, mirrored half of the time. Validation images
are taken whole: the shorter side is resized to --side, square windows cover the longer one, logits are averaged where
windows overlap and upsampled to the annotation's own size, so that every pixel counts.

FOLDER holds images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png, 8-bit PNGs of class
numbers; 255 never counts. In ADE20K's release (ADEChallengeData2016) 0 is "other", which does not count either, and the
classes are 1..150: this is what is expected. Where 0 is a class like others, say --no-zero-is-ignored.

CKPT is a run folder, a checkpoint in it, or a folder in NEPA's official layout; of a classifier the backbone is used.
On several GPUs: torchrun --nproc_per_node N tools/segment.py ...; the result is the same for any N, up to rounding.

examples:
  python tools/segment.py runs/vit_b14 --data data/ADEChallengeData2016 --classes 150 --bidirectional
  torchrun --nproc_per_node 8 tools/segment.py runs/vit_b14 --data data/ADEChallengeData2016 --side 518 --steps 40000
  python tools/segment.py runs/demo --data my/folder --no-zero-is-ignored --plot segments.png --output head.safetensors
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from nepa_scale.command_line import Parser, add_result_options, deliver, positive, run
from nepa_scale.config import ConfigError
from nepa_scale.data.overlap import ImageFiles, same_images
from nepa_scale.data.segmentation_folder import IGNORED, RandomCrops, Split, WholeImages
from nepa_scale.evaluation.held_out import require_other_images
from nepa_scale.evaluation.loading import attends_causally, load_any
from nepa_scale.evaluation.offline import spread_blocks
from nepa_scale.evaluation.segmentation import (
    DenseFeatures,
    LinearHead,
    Recipe,
    confusion_matrix,
    predict,
    scores,
    survey,
    train_head,
)
from nepa_scale.evaluation.segmentation_report import describe, draw
from nepa_scale.sharding import World, join_world, leave_world
from nepa_scale.training.departure import depart
from nepa_scale.training.progress import with_progress
from nepa_scale.training.weights import KINDS, WEIGHTS_HELP

PICTURES = 4


def parse() -> argparse.Namespace:
    recipe = Recipe()
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a run folder, a checkpoint, an official folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="images and annotations, see above")
    parser.add_argument(
        "--zero-is-ignored", action=argparse.BooleanOptionalAction, default=True,
        help="whether label 0 is no class, as in ADE20K (default: it is none)",
    )  # fmt: skip
    parser.add_argument("--classes", type=positive, metavar="C", help="default: the highest label says; ADE20K: 150")
    parser.add_argument("--weights", choices=list(KINDS), help=WEIGHTS_HELP)
    parser.add_argument(
        "--blocks", type=positive, nargs="+", metavar="N", help="from 1 (default: each quarter of the depth)"
    )
    parser.add_argument("--bidirectional", action="store_true", help="features without the causal mask")
    parser.add_argument(
        "--side", type=positive, metavar="S", help="of crops and windows, pixels (default: the model's)"
    )
    parser.add_argument("--steps", type=positive, default=recipe.steps, metavar="N", help=f"(default: {recipe.steps})")
    parser.add_argument(
        "--batch-size", type=positive, default=recipe.batch_size, metavar="N",
        help=f"crops a step, of all ranks (default: {recipe.batch_size})",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, default=recipe.lr, help=f"peak, of AdamW (default: {recipe.lr:g})")
    parser.add_argument("--seed", type=int, default=0, help="of order and crops (default: 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="reading processes per rank (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FILE.safetensors", help="keep the trained head")
    add_result_options(parser)
    arguments = parser.parse_args()
    if (arguments.classes or 1) > IGNORED:
        parser.error(f"--classes {arguments.classes} must be at most {IGNORED}: annotations have 8 bits")
    if arguments.workers < 0:
        parser.error(f"--workers {arguments.workers} must not be negative")
    if not 0 < arguments.lr < math.inf:
        parser.error(f"--lr {arguments.lr} must be above 0")
    if arguments.plot and arguments.plot.suffix != ".png":
        parser.error(f"--plot {arguments.plot} must be named .png")
    return arguments


def main() -> int:
    arguments = parse()
    multiprocessing.set_forkserver_preload(["nepa_scale.data.segmentation_folder"])
    world = join_world()
    try:
        facts = segment(arguments, world)
    finally:
        leave_world()
    if world.is_main:
        deliver(facts, describe(facts), arguments.json)
    return 0


def segment(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Checks, trains, evaluates; rank 0 writes head and pictures. Returns what is reported."""
    began = time.monotonic()
    training, validation = (
        Split.open(arguments.data, name, arguments.zero_is_ignored) for name in ("training", "validation")
    )
    same = same_images(*(ImageFiles([image for image, _ in split.pairs]) for split in (validation, training)))
    places = (f"{arguments.data}/images/{name}" for name in ("validation", "training"))
    note = require_other_images(same, len(validation), *places)
    if note and world.is_main:
        print(f"warning: {note}", file=sys.stderr)
    loaded = load_any(arguments.checkpoint, arguments.weights)
    if loaded.note and world.is_main:
        print(loaded.note, file=sys.stderr)
    task, backbone = loaded.task, loaded.task.backbone
    architecture, workers = backbone.architecture, arguments.workers
    side, patch = arguments.side or min(architecture.image_size), architecture.patch_size
    if side % patch:
        raise ConfigError(f"--side {side} does not divide into patches of {patch}: try {max(side // patch, 1) * patch}")
    blocks = [block - 1 for block in arguments.blocks or ()] or spread_blocks(architecture.depth)
    if max(blocks) >= architecture.depth:
        raise ConfigError(f"--blocks must be between 1 and {architecture.depth}")

    def shown(items: Iterable[Any], title: str, count: int) -> Iterator[Any]:
        return with_progress(items, title, count) if world.is_main else iter(items)

    classes = survey([training, validation], patch, arguments.classes, world, workers, shown)
    causal = attends_causally(task) and not arguments.bidirectional
    features = DenseFeatures(backbone.to(world.device).eval(), blocks, causal)
    recipe = Recipe(arguments.steps, arguments.batch_size, arguments.lr)
    crops, images = RandomCrops(training, side, arguments.seed), WholeImages(validation, side, patch)
    head, loss = train_head(features, classes, crops, recipe, world, workers, shown)
    if arguments.output and world.is_main:
        save_head(head, arguments.output)
    confusion = confusion_matrix(features, head, images, world, workers, shown)
    if arguments.plot and world.is_main:
        draw_some(features, head, images, world, arguments.plot)
    return {
        **loaded.facts,
        "data": str(arguments.data),
        "blocks": [block + 1 for block in blocks],
        "causal": features.causal,
        "side": side,
        "steps": recipe.steps,
        "train_images": len(training),
        "val_images": len(validation),
        "val_in_train": same / len(validation),
        "classes": classes,
        "zero_is_ignored": arguments.zero_is_ignored,
        "loss": loss,
        **scores(confusion, int(arguments.zero_is_ignored)),
        "seconds": time.monotonic() - began,
    }


def save_head(head: LinearHead, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: value.cpu().contiguous() for name, value in head.state_dict().items()}, path)
    except SafetensorError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def draw_some(features: DenseFeatures, head: LinearHead, images: WholeImages, world: World, path: Path) -> None:
    """A few validation images, evenly spread over the split."""
    rows = []
    for number in range(min(PICTURES, len(images))):
        index = number * len(images) // min(PICTURES, len(images))
        image, label = images[index]
        predicted = predict(features, head, image.to(world.device), label.shape).cpu()
        name = images.split.pairs[index][0].stem
        rows.append((name, image.permute(1, 2, 0).numpy(), label.numpy(), predicted.numpy()))
    draw(path, rows)


if __name__ == "__main__":
    depart(run(main))
