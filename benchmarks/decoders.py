"""JPEG decoders and resizers on one core, and how far they are from torchvision's crop: results/decoders.{json,md}.

Contestants take turns in every round; numbers are medians over the rounds. The whole chain is decode, RandomResizedCrop
and resize to 224 x 224; its difference is that to torchvision's RandomResizedCrop(antialias=True) of the same box, on
pixels decoded by Pillow. PyTurboJPEG runs where it and the turbojpeg library are installed, cv2 where it is.

examples:
  python benchmarks/decoders.py --images ~/imagenet/train       a folder with .JPEG or .jpg files in it, at any depth
  python benchmarks/decoders.py --images photos --count 100 --rounds 9
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from PIL import Image
from report import RESULTS, machine, publish
from rich.console import Console
from rich.progress import track
from torchvision.io import ImageReadMode, decode_jpeg

from nepa_scale.config import EXIT_USAGE
from nepa_scale.data.crops import Box, random_resized_box
from nepa_scale.data.decode import EncodedImage, resize

SIZE = 224
Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes], Any]
Chain = Callable[[bytes, Box], Any]  # to pixels [224, 224, 3]


def pillow(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_io(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def decoders() -> dict[str, Decoder]:
    """Whole images at full size, to RGB."""
    buffer = np.empty(1 << 27, dtype=np.uint8)
    found: dict[str, Decoder] = {
        "Pillow": pillow,
        "torchvision.io": torchvision_io,
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "simplejpeg, memory used again": lambda data: simplejpeg.decode_jpeg(data, "RGB", buffer=buffer),
        "simplejpeg, fast DCT and upsampling": lambda data: simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=True, buffer=buffer
        ),
    }
    try:
        import cv2

        cv2.setNumThreads(1)
        found["cv2"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except ImportError as error:
        print(f"left out: cv2 ({error})", file=sys.stderr)
    try:
        import turbojpeg

        library = turbojpeg.TurboJPEG()
        found["PyTurboJPEG"] = lambda data: library.decode(data, pixel_format=turbojpeg.TJPF_RGB)
    except (ImportError, RuntimeError, OSError) as error:
        print(f"left out: PyTurboJPEG ({str(error).splitlines()[0]})", file=sys.stderr)
    return found


def pillow_chain(data: bytes, box: Box) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=edges))


def pillow_draft_chain(data: bytes, box: Box) -> Pixels:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    zoom = min(box.width, box.height) / SIZE
    image.draft("RGB", (max(1, int(width / zoom)), max(1, int(height / zoom))))
    x, y = image.width / width, image.height / height
    edges = (box.left * x, box.top * y, (box.left + box.width) * x, (box.top + box.height) * y)
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=edges))


def torchvision_chain(data: bytes, box: Box) -> torch.Tensor:
    pixels = torchvision_io(data)
    return TF.resized_crop(pixels, box.top, box.left, box.height, box.width, [SIZE, SIZE], antialias=True)


def chains() -> dict[str, Chain]:
    """From the file's bytes to the crop."""
    out = torch.empty((SIZE, SIZE, 3), dtype=torch.uint8)

    def our_chain(data: bytes, box: Box) -> torch.Tensor:
        EncodedImage(data).resized_crop(box, out)
        return out

    found: dict[str, Chain] = {
        "Pillow decode and resize": pillow_chain,
        "Pillow draft and resize": pillow_draft_chain,
        "torchvision.io, resized_crop": torchvision_chain,
        "nepa_scale: simplejpeg, torch in place": our_chain,
    }
    try:
        import cv2

        def cv2_chain(data: bytes, box: Box) -> Pixels:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
            shrinks = box.width > SIZE or box.height > SIZE
            return cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

        found["cv2 decode, area or linear"] = cv2_chain
    except ImportError:
        pass
    return found


def resizers(out: torch.Tensor) -> dict[str, Callable[[Pixels], Any]]:
    """From a cut part to 224 x 224."""

    def interpolate(part: Pixels) -> torch.Tensor:
        planes = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1).unsqueeze(0)
        return torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)

    return {
        "Pillow bilinear": lambda part: Image.fromarray(part).resize((SIZE, SIZE), Image.Resampling.BILINEAR),
        "torch F.interpolate, antialiased": interpolate,
        "the same kernel, in place": lambda part: resize(part, out),
    }


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(files: list[bytes], rounds: int) -> dict[str, Any]:
    whole = [pillow(data) for data in files]
    boxes = [random_resized_box(p.shape[1], p.shape[0], n, (0.08, 1.0), (3 / 4, 4 / 3)) for n, p in enumerate(whole)]
    parts = [p[b.top : b.top + b.height, b.left : b.left + b.width].copy() for p, b in zip(whole, boxes, strict=True)]
    out = torch.empty((SIZE, SIZE, 3), dtype=torch.uint8)
    pairs = list(zip(files, boxes, strict=True))
    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "decode": {name: lambda f=f: [f(data) for data in files] for name, f in decoders().items()},
        "resize": {name: lambda f=f: [f(part) for part in parts] for name, f in resizers(out).items()},
        "chain": {name: lambda f=f: [f(*pair) for pair in pairs] for name, f in chains().items()},
    }
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in some} for kind, some in jobs.items()}
    for _ in track(range(rounds), "rounds", console=Console(stderr=True), transient=True):
        for kind, some in jobs.items():
            for name, job in some.items():
                times[kind][name].append(seconds(job) / len(files))
    differences = {name: difference(chain, pairs, whole) for name, chain in chains().items()}
    return {
        "milliseconds": {k: {n: 1e3 * statistics.median(t) for n, t in some.items()} for k, some in times.items()},
        "difference": differences,
        "pixels": statistics.mean(p.shape[0] * p.shape[1] for p in whole),
    }


def difference(chain: Chain, pairs: list[tuple[bytes, Box]], whole: list[Pixels]) -> dict[str, float]:
    """Mean and largest difference to torchvision's crop, of 255."""
    means, largest = [], 0.0
    for (data, box), pixels in zip(pairs, whole, strict=True):
        planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        expected = TF.resized_crop(planes, box.top, box.left, box.height, box.width, [SIZE, SIZE], antialias=True)
        crop = chain(data, box)
        found = crop if isinstance(crop, torch.Tensor) else torch.from_numpy(np.array(crop))
        found = found if found.shape[0] == 3 else found.permute(2, 0, 1)
        apart = (found.float() - expected.float()).abs()
        means.append(apart.mean().item())
        largest = max(largest, apart.max().item())
    return {"mean": statistics.mean(means), "max": largest}


def table(facts: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"Measured with `python benchmarks/decoders.py --images FOLDER` on one core of {facts['machine']}, "
        f"{facts['images']} images of {facts['bytes_per_image'] / 1e3:.0f} KB and {facts['pixels'] / 1e3:.0f}k pixels: "
        f"medians of {facts['repeats']} rounds in which all took turns.",
        "",
        "| decoding, whole | ms an image |",
        "| --- | --- |",
        *(f"| {name} | {value:.3f} |" for name, value in facts["milliseconds"]["decode"].items()),
        "",
        "| resizing a random crop to 224 x 224 | ms |",
        "| --- | --- |",
        *(f"| {name} | {value:.3f} |" for name, value in facts["milliseconds"]["resize"].items()),
        "",
        "| file to random crop | ms | difference to torchvision of 255: mean, largest |",
        "| --- | --- | --- |",
    ]
    for name, value in facts["milliseconds"]["chain"].items():
        apart = facts["difference"][name]
        lines.append(f"| {name} | {value:.3f} | {apart['mean']:.2f}, {apart['max']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with JPEG files in it")
    parser.add_argument("--count", type=int, default=300, help="images, evenly spread over the folder (default: 300)")
    parser.add_argument("--rounds", type=int, default=9, help="medians are over so many (default: 9)")
    parser.add_argument("--json", type=Path, default=RESULTS / "decoders.json", help="where the numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg"))
    if not paths:
        print(f"error: no .JPEG or .jpg files under {arguments.images}", file=sys.stderr)
        return EXIT_USAGE
    files = [path.read_bytes() for path in paths[:: max(1, len(paths) // arguments.count)][: arguments.count]]
    facts = measure(files, arguments.rounds)
    facts |= {
        "images": len(files),
        "bytes_per_image": statistics.mean(map(len, files)),
        "repeats": arguments.rounds,
        "machine": machine(),
    }
    publish(arguments.json, facts, table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
