"""Evaluates a checkpoint: kNN, probes and spectrum of a pretrained backbone, or a classifier's accuracy.

CKPT is a run folder, a checkpoint in it (RUN/checkpoints/step_00001000), or a folder in NEPA's official layout. On
several GPUs: torchrun --nproc_per_node N tools/evaluate.py ...; the result is the same for any N.

examples:
  python tools/evaluate.py runs/demo --data data/demo/val --train data/demo/train
  python tools/evaluate.py runs/vit_b14 --data data/imagenet/val --weights raw --bidirectional --no-probe
  python tools/evaluate.py runs/vit_b14 --data data/imagenet/val --attentive 10
  python tools/evaluate.py runs/vit_b14_in1k --data data/imagenet/val
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nepa_scale.config import EXIT_USAGE, Config, ConfigError, DataConfig
from nepa_scale.data import DataError, EvaluationStream, ShardSet
from nepa_scale.data.batch import Batch
from nepa_scale.data.overlap import same_samples
from nepa_scale.data.remote import is_remote
from nepa_scale.evaluation.accuracy import Accuracy
from nepa_scale.evaluation.attentive_probe import AttentiveProbe
from nepa_scale.evaluation.held_out import describe_same, match_classes, require_other_images
from nepa_scale.evaluation.loading import attends_causally, load_any, source_of
from nepa_scale.evaluation.offline import FeatureSettings, evaluate_features, spread_blocks
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.objectives import Classifier
from nepa_scale.sharding import World, join_world, leave_world
from nepa_scale.training.departure import depart
from nepa_scale.training.weights import KINDS, WEIGHTS_HELP


def main() -> int:
    arguments = _parser().parse_args()
    multiprocessing.set_forkserver_preload(["nepa_scale.data"])
    try:
        world = join_world()
        try:
            facts = evaluate(arguments, world)
        finally:
            leave_world()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else 1
    if world.is_main:
        report(facts, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a run folder, a checkpoint, an official folder")
    parser.add_argument("--data", required=True, help="shards to evaluate on; without labels: the effective rank alone")
    parser.add_argument("--train", help="labelled shards for kNN and probe (default: those the run was trained on)")
    parser.add_argument("--weights", choices=list(KINDS), help=WEIGHTS_HELP)
    parser.add_argument("--bank", type=int, default=50_000, help="training images used, evenly spread (default: 50000)")
    parser.add_argument(
        "--blocks", type=int, nargs="+", help="probe these, from 1 (default: each quarter of the depth)"
    )
    parser.add_argument("--pooling", choices=["mean", "last"], default="mean", help="of the patches, or the last token")
    parser.add_argument(
        "--bidirectional", action="store_true", help="without a causal mask, as mae and jepa always are"
    )
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="kNN and spectrum only")
    parser.add_argument(
        "--attentive", type=int, default=0, metavar="EPOCHS", help="also an attentive probe of the last block probed"
    )
    parser.add_argument("--interpolation", choices=["bilinear", "bicubic"], help="default: the run's, else bilinear")
    parser.add_argument(
        "--crop-share", type=float, help="resize to int(size / this), then crop (default: the run's, else 0.875)"
    )
    parser.add_argument(
        "--squash", action=argparse.BooleanOptionalAction, help="resize without keeping the aspect (default: the run's)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="per rank (default: 64)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per rank (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="also write the result as one JSON object; - for stdout only")
    return parser


def evaluate(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    began = time.monotonic()
    loaded = load_any(arguments.checkpoint, arguments.weights)
    task, config = loaded.task.to(world.device), loaded.config
    if loaded.note and world.is_main:
        print(loaded.note, file=sys.stderr)
    crop = preparation(arguments, config)
    data = DataConfig(workers=arguments.workers, interpolation=crop.interpolation)
    val = ShardSet.open(arguments.data, data)
    facts: dict[str, Any] = loaded.facts | asdict(crop)

    def shown(batches: Iterable[Batch], title: str, count: int) -> Iterator[Batch]:
        console = Console(stderr=True)
        return iter(track(batches, title, count, console=console, transient=True, disable=not world.is_main))

    def one_pass(source: ShardSet, title: str, classes: int | None, limit: int | None = None) -> Iterator[Batch]:
        stream = EvaluationStream(
            source,
            data,
            image_size=task.backbone.architecture.image_size,
            batch_size=arguments.batch_size,
            rank=world.rank,
            world_size=world.size,
            limit=limit,
            crop_share=crop.crop_share,
            squash=crop.squash,
            classes=classes,
        )
        try:
            yield from shown(stream, title, len(stream))
        finally:
            stream.close()

    def say(note: str) -> None:
        if note and world.is_main:
            print(f"warning: {note}", file=sys.stderr)

    if isinstance(task, Classifier):
        classes = task.head.out_features
        if val.classes is None:
            raise ConfigError(f"{arguments.data} has no labels, which the accuracy of a classifier needs")
        names = loaded.class_names
        if names and val.class_names and config is None and other_words(names, val.class_names):
            say(f"{arguments.data} and the classifier have other names for {classes} classes: matched by number")
            names = None
        val, note = match_classes(val, arguments.data, names, classes, "the classifier")
        if (val.classes or 0) > classes:
            raise ConfigError(f"{arguments.data} has {val.classes} classes, and the classifier only {classes}")
        say(note)
        trained_on = training_shards(config, data)
        same = same_samples(val, trained_on) if trained_on else 0
        say(describe_same(same, len(val), arguments.data, f"the training set {config.data.train}" if config else ""))
        facts["val_in_train"] = same / len(val) if trained_on else None
        facts |= Accuracy(lambda: one_pass(val, "classifying", classes), world).of_module(task)
    else:
        depth = task.backbone.architecture.depth
        blocks = spread_blocks(depth) if arguments.blocks is None else [block - 1 for block in arguments.blocks]
        if not all(0 <= block < depth for block in blocks):
            raise ConfigError(f"--blocks must be between 1 and {depth}")
        source = arguments.train or (config.data.train if config else None)
        if source is None and val.classes is not None:
            raise ConfigError("give --train: kNN and probe need labelled training shards")
        train = ShardSet.open(source, data) if source is not None else val
        if source is None or train.classes is None or val.classes is None:
            nameless = arguments.data if val.classes is None else source
            if arguments.attentive > 0:
                raise ConfigError(f"--attentive needs labels, and {nameless} has none")
            say(f"no labels in {nameless}: what is evaluated without them is the effective rank")
            classes = None
        else:
            same = same_samples(val, train)
            known = require_other_images(same, len(val), arguments.data, source)
            facts["val_in_train"] = same / len(val)
            val, note = match_classes(val, arguments.data, train.class_names, train.classes, source)
            say(known)
            say(note)
            classes = max(train.classes, val.classes or 0)
        causal = attends_causally(task) and not arguments.bidirectional
        settings = FeatureSettings(blocks, causal, arguments.pooling)
        bank = one_pass(train, "training features", classes, arguments.bank)
        queries = one_pass(val, "validation features", classes)
        facts |= evaluate_features(task.backbone, bank, queries, classes, world, settings, probe=arguments.probe)
        if arguments.attentive > 0 and classes is not None:
            probe = AttentiveProbe(task.backbone, blocks[-1], classes, world, causal=settings.causal)
            cropped = replace(data, crop_scale=config.data.crop_scale) if config else data  # as in pretraining
            probe.fit_on(train, cropped, arguments.attentive, lambda stream, count: shown(stream, "probing", count))
            scores = Accuracy(lambda: one_pass(val, "validation tokens", classes), world).of_module(probe)
            facts |= {f"attentive_{name}": value for name, value in scores.items()} | {"attentive_lr": probe.lr}
    return facts | {"seconds": time.monotonic() - began}


def other_words(names: list[str], others: list[str]) -> bool:
    """Whether two lists may name the same classes in two ways, as ImageNet's are named by synset and in English."""
    return len(names) == len(others) and not set(names) & set(others)


def training_shards(config: Config | None, data: DataConfig) -> ShardSet | None:
    """Those of the run, where they lie on this machine: nothing is fetched."""
    source = config.data.train if config else None
    if source is None or source.endswith(".txt") or any(map(is_remote, source.split("::"))):
        return None
    try:
        return ShardSet.open(source, data)
    except ConfigError:
        return None


def preparation(arguments: argparse.Namespace, config: Config | None) -> Preprocessing:
    """How images are resized and cropped: as the run evaluated, or as an official folder says; options go over it.

    Raises:
        ConfigError: a crop share that is none, or the folder's file is damaged.
    """
    file = arguments.checkpoint / "preprocessor_config.json"
    own = Preprocessing()
    if config is not None:
        own = Preprocessing.of(config)
    elif file.is_file():
        try:
            own = Preprocessing.from_hugging_face(json.loads(file.read_text()))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{file} is not a JSON object") from error
    given = {name: getattr(arguments, name) for name in ("crop_share", "squash", "interpolation")}
    chosen = replace(own, **{name: value for name, value in given.items() if value is not None})
    if not 0.01 <= chosen.crop_share <= 1:
        raise ConfigError(f"--crop-share {chosen.crop_share} must be between 0.01 and 1")
    return chosen


def report(facts: dict[str, Any], json_file: str | None) -> None:
    if json_file == "-":
        print(json.dumps(facts))
        return
    if json_file:
        Path(json_file).write_text(json.dumps(facts) + "\n")
    crop = f"crop {facts['crop_share']:.4g}{' squashed' if facts['squash'] else ''}, {facts['interpolation']}"
    known = f"; {facts['val_in_train']:.1%} of the images are training images" if facts.get("val_in_train") else ""
    print(f"{source_of(facts)}, {crop}, {facts['seconds']:.0f} s{known}")
    labels = {
        "top1": "top-1",
        "top5": "top-5",
        "knn_top1": "kNN top-1, k 20",
        "knn10_top1": "kNN top-1, k 10",
        "probe_top1": "linear probe, best block",
        "probe_last_top1": "linear probe, last block",
        "attentive_top1": "attentive probe",
    }
    for key, label in labels.items():
        if key in facts:
            print(
                f"  {label:<26}{facts[key]:.1%}" + (f"  (block {facts['probe_block']})" if key == "probe_top1" else "")
            )
    if "effective_rank" in facts:
        print(f"  {'effective rank':<26}{facts['effective_rank']:.1f}")
    for row in facts.get("probe", []):
        print(f"    block {row['block']:>3}   top-1 {row['top1']:.1%}   top-5 {row['top5']:.1%}   lr {row['lr']:g}")


if __name__ == "__main__":
    depart(main())
