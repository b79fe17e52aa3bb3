"""The data stream against stock loaders, on the same images with the same workers: results/data.{json,md}.

Contestants take turns in every round, so that what else the machine does falls on all alike; ratios are medians over
the rounds of the ratio within a round. Each is warm when its time begins. litdata and mosaicml-streaming run where they
are installed.

examples:
  python benchmarks/data.py --images ~/imagenet/train           a folder of class folders; some 1000 images suffice
  python benchmarks/data.py --images sample --rounds 9 --without litdata mosaic
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from data_peers import (
    SIZE,
    Batches,
    Peer,
    image_folder,
    litdata_stream,
    mosaic_stream,
    webdataset_pil,
    webdataset_uint8,
)
from report import RESULTS, machine, publish
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nepa_scale.config import EXIT_USAGE, ConfigError, DataConfig
from nepa_scale.data import ShardSet, TrainStream
from nepa_scale.data.crops import random_resized_box
from nepa_scale.data.decode import EncodedImage
from nepa_scale.data.order import Permutation
from nepa_scale.data.shard_maker import make_shards
from nepa_scale.data.stage_times import measure_stages

BATCH = 64
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
OURS, BARE, STOCK = "this stream", "bare decode-crop loop", "webdataset + torchvision v2"
IMAGENET = 1_281_167  # training images
TARGETS = {"stream_to_stock": 1.8, "stream_to_bare": 0.92, "raw_to_stock": 5.0, "two_workers_to_one": 1.85}


def stream_of(shards: ShardSet, workers: int, start_step: int = 0) -> TrainStream:
    return TrainStream(
        shards,
        DataConfig(workers=workers),
        image_size=(SIZE, SIZE),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        seed=0,
        rank=0,
        world_size=1,
        start_step=start_step,
    )


def stream(shards: ShardSet) -> Peer:
    def batches(workers: int, batch: int) -> Batches:
        assert batch == BATCH
        ours = stream_of(shards, workers)
        try:
            for one in ours:
                yield one.images, one.labels
        finally:
            ours.close()

    return batches


def rate_of(peer: Peer, workers: int, images: int) -> float:
    """Images a second, after as many batches as its processes keep ready have been taken."""
    batches = peer(workers, BATCH)
    deque(islice(batches, 8 * max(1, workers)), maxlen=0)
    began = time.perf_counter()
    seen = sum(len(labels) for _, labels in islice(batches, -(-images // BATCH)))
    rate = seen / (time.perf_counter() - began)
    del batches
    gc.collect()  # ends the loader's processes
    return rate


def crop_images(shards: ShardSet, pipe: Connection) -> None:
    """A process that does nothing but decode, cut and resize images that lie in its memory."""
    torch.set_num_threads(1)
    images = [shards.read(sample).image for sample in range(len(shards))]
    out = torch.empty((BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
    for first, count in iter(pipe.recv, None):
        for number in range(first, first + count):
            image = EncodedImage(images[number * 7919 % len(images)])
            image.resized_crop(random_resized_box(image.width, image.height, number, SCALE, RATIO), out[number % BATCH])
        pipe.send(None)


class Bare:
    """The ceiling: as many such processes as a loader would have workers."""

    def __init__(self, shards: ShardSet, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipes: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            context.Process(target=crop_images, args=(shards, theirs), daemon=True).start()
            self._pipes.append(ours)
        self.rate(workers, 256)

    def rate(self, workers: int, images: int) -> float:
        began = time.perf_counter()
        for number, pipe in enumerate(self._pipes[:workers]):
            pipe.send((number * 100_003, images // workers))
        for pipe in self._pipes[:workers]:
            pipe.recv()
        return images // workers * workers / (time.perf_counter() - began)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


def raw_by_index(shards: ShardSet) -> float:
    """Encoded samples a second, in the order of a permutation, by one process."""
    order = Permutation(len(shards), 1)(np.arange(len(shards))).tolist()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1.0:
        for sample in order:
            shards.read(sample)
        count += len(order)
    return count / (time.perf_counter() - began)


def raw_by_webdataset(shards: list[str]) -> float:
    """Encoded samples a second, one after the other as they lie in the shards, by one process."""
    samples = iter(wds.WebDataset(shards, shardshuffle=False).repeat())
    for _ in islice(samples, 100):
        pass
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1.0:
        count += sum(1 for _ in islice(samples, 100))
    return count / (time.perf_counter() - began)


def synthetic_imagenet(shard: Path, samples: int, folder: Path) -> Path:
    """As many samples as ImageNet: one shard and its index under a thousand names."""
    folder.mkdir()
    for number in range(-(-IMAGENET // samples)):
        os.link(shard, folder / f"shard-{number:06d}.tar")
        os.link(f"{shard}.idx", folder / f"shard-{number:06d}.tar.idx")
    return folder


def restart(folder: Path, workers: int, rounds: int) -> dict[str, float]:
    """Seconds from nothing to the first batch in the middle of an epoch and at its beginning; of that to open the set.

    The server from which workers are forked is there already: to start it takes the time of importing torch, once.
    """
    times: dict[str, list[float]] = {"open_seconds": [], "middle_seconds": [], "beginning_seconds": []}
    for _ in range(rounds):
        for where in ("middle", "beginning"):
            began = time.perf_counter()
            shards = ShardSet.open(str(folder), DataConfig(workers=workers))
            times["open_seconds"].append(time.perf_counter() - began)
            stream = stream_of(shards, workers, start_step=len(shards) // BATCH // 2 if where == "middle" else 0)
            next(iter(stream))
            times[f"{where}_seconds"].append(time.perf_counter() - began)
            stream.close()
    return {"samples": len(shards)} | {name: statistics.median(some) for name, some in times.items()}


def contestants(images: Path, made: Path, shards: ShardSet, without: list[str]) -> dict[str, Peer]:
    found: dict[str, Peer] = {
        OURS: stream(shards),
        STOCK: webdataset_pil(shards.names),
        "webdataset + decode_jpeg, uint8": webdataset_uint8(shards.names),
        "ImageFolder + DataLoader": image_folder(images),
    }
    makers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "litdata": ("litdata, uint8", lambda: litdata_stream(images, made / "litdata")),
        "mosaic": ("mosaicml-streaming", lambda: mosaic_stream(images, made / "mosaic")),
    }
    for short, (name, make) in makers.items():
        if short in without:
            continue
        try:
            found[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    multiprocessing.set_start_method("fork", force=True)  # torch's default here, which litdata changes for everybody
    return found


def steps(
    race: dict[str, Peer], bare: Bare, shards: ShardSet, images: int, workers: int
) -> Iterator[tuple[str, float]]:
    """One round: what was measured and the number."""
    for name, peer in race.items():
        yield name, rate_of(peer, workers, images)
        if name == OURS:
            yield BARE, bare.rate(workers, images)
            yield f"{OURS}, 1 worker", rate_of(peer, 1, images // 2)
            yield f"{BARE}, 1 worker", bare.rate(1, images // 2)
    yield "raw by index", raw_by_index(shards)
    yield "raw by webdataset", raw_by_webdataset(shards.names)


def measure(images: Path, rounds: int, count: int, workers: int, without: list[str], made: Path) -> dict[str, Any]:
    make_shards(images, made / "shards", samples_per_shard=100)
    make_shards(images, made / "one", samples_per_shard=10**6)
    shards = ShardSet.open(str(made / "shards"), DataConfig())
    race = contestants(images, made, shards, without)
    bare = Bare(shards, workers)
    rows: list[dict[str, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds", total=rounds * (len(race) + 5))
        for _ in range(rounds):
            row = {}
            for name, number in steps(race, bare, shards, count, workers):
                row[name] = number
                bar.update(task, advance=1, description=name)
            rows.append(row)
    bare.close()
    synthetic = synthetic_imagenet(next((made / "one").glob("*.tar")), len(shards), made / "imagenet")
    reader = stream_of(shards, 0).reader
    return {
        "images": len(shards),
        "bytes_per_image": sum(Path(name).stat().st_size for name in shards.names) / len(shards),
        "rounds": rows,
        "restart": {f"{n} workers": restart(synthetic, n, rounds) for n in (0, workers)},
        "stages": stages(reader),
    }


def stages(reader: Any) -> dict[str, Any]:
    measure_stages(reader, range(2), SCALE, RATIO)
    found = measure_stages(reader, range(20), SCALE, RATIO)
    return {"images_per_second_per_core": 1 / found.total, "shares": found.shares}


def ratio(rows: list[dict[str, float]], one: str, other: str) -> dict[str, Any]:
    """Median, least and largest of the ratio within a round."""
    ratios = sorted(row[one] / row[other] for row in rows)
    return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}


def ratios(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "stream_to_stock": ratio(rows, OURS, STOCK),
        "stream_to_bare": ratio(rows, OURS, BARE),
        "raw_to_stock": ratio(rows, "raw by index", "raw by webdataset"),
        "two_workers_to_one": ratio(rows, OURS, f"{OURS}, 1 worker"),
    }


def table(facts: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = facts["rounds"]
    names = [name for name in rows[0] if not name.startswith("raw")]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in facts["stages"]["shares"].items())
    lines = [
        f"Measured with `{facts['command']}` on {facts['machine']}, {facts['images']} images of "
        f"{facts['bytes_per_image'] / 1e3:.0f} KB, {facts['workers']} workers unless said otherwise: medians of "
        f"{len(rows)} rounds in which all took turns; in brackets the least and the largest.",
        "",
        "| loader | images/s | this stream is faster by |",
        "| --- | --- | --- |",
    ]
    for name in names:
        rates = sorted(row[name] for row in rows)
        faster = ratio(rows, OURS, name)
        beside = "" if name.startswith(OURS) or "1 worker" in name else show(faster)
        lines.append(f"| {name} | {statistics.median(rates):,.0f} ({rates[0]:,.0f} - {rates[-1]:,.0f}) | {beside} |")
    raw = [statistics.median(row[name] for row in rows) for name in ("raw by index", "raw by webdataset")]
    middle = facts["restart"]
    texts = {
        "stream_to_stock": "this stream / stock webdataset + torchvision",
        "stream_to_bare": "this stream / bare decode-crop loop of the same decoder",
        "raw_to_stock": f"raw samples/s, shuffled by index ({raw[0]:,.0f}) / webdataset in sequence ({raw[1]:,.0f})",
        "two_workers_to_one": "2 workers / 1 worker",
    }
    lines += ["", "| ratio | measured | target |", "| --- | --- | --- |"]
    lines += [f"| {text} | {show(facts['ratios'][key])} | >= {TARGETS[key]:g} |" for key, text in texts.items()]
    for name, found in middle.items():
        lines.append(
            f"| start in the middle of an epoch of {found['samples']:,} samples, {name}, to the first batch "
            f"| {found['middle_seconds']:.2f} s (at its beginning {found['beginning_seconds']:.2f} s; of that to open "
            f"the set {found['open_seconds']:.2f} s) | < 1 s |"
        )
    core = facts["stages"]["images_per_second_per_core"]
    lines += ["", f"One worker's time, {core:,.0f} images/s: {shares}."]
    return "\n".join(lines) + "\n"


def show(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders of .JPEG files")
    parser.add_argument("--rounds", type=int, default=7, help="medians are over so many (default: 7)")
    parser.add_argument("--count", type=int, default=4000, help="images in each measurement (default: 4000)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each loader (default: 2)")
    parser.add_argument("--without", nargs="*", default=[], choices=["litdata", "mosaic"], help="leave these out")
    parser.add_argument("--json", type=Path, default=RESULTS / "data.json", help="where the numbers go")
    arguments = parser.parse_args()
    # workers of all contestants start from processes that have imported this program
    heavy = ["nepa_scale.data", "torchvision.datasets", "torchvision.transforms.v2", "webdataset", "rich.progress"]
    multiprocessing.set_forkserver_preload(heavy)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="data_benchmark_") as made:
            facts = measure(
                arguments.images, arguments.rounds, arguments.count, arguments.workers, arguments.without, Path(made)
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    command = f"python benchmarks/data.py --images FOLDER --rounds {arguments.rounds} --count {arguments.count}"
    facts |= {"machine": machine(), "workers": arguments.workers, "command": command, "ratios": ratios(facts["rounds"])}
    publish(arguments.json, facts, table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
