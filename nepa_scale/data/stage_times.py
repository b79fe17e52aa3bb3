"""Where the time of one process that prepares samples goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nepa_scale.data.crops import random_resized_box
from nepa_scale.data.decode import EncodedImage, resize
from nepa_scale.data.sample_reader import SampleReader


@dataclass
class StageSeconds:
    """Seconds for each sample: read from the shard, decoded and cut, resized; `rest` is order, draws and collation."""

    read: float
    decode: float
    resize: float
    rest: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def shares(self) -> dict[str, float]:
        """Of the total, 0..1."""
        return {name: seconds / self.total for name, seconds in asdict(self).items()}


def measure_stages(
    reader: SampleReader, numbers: Sequence[int], scale: tuple[float, float], ratio: tuple[float, float]
) -> StageSeconds:
    """Times the stages alone and the reader whole, in this process, on the micro-batches `numbers` of training.

    scale, ratio: of the random crop, as the reader has them
    """
    samples = [int(sample) for number in numbers for sample in reader.order.place(number).samples]
    began = time.perf_counter()
    raw = [reader.shards.read(sample).image for sample in samples]
    read = time.perf_counter() - began

    decode = resizing = 0.0
    out = torch.empty((*reader.size, 3), dtype=torch.uint8)
    for key, data in enumerate(raw):
        image = EncodedImage(data)
        box = random_resized_box(image.width, image.height, key, scale, ratio)
        began = time.perf_counter()
        pixels = image.cut(box, reader.size)
        decoded = time.perf_counter()
        resize(pixels, out)
        resizing += time.perf_counter() - decoded
        decode += decoded - began

    batch = np.empty(reader.shape, dtype=np.uint8)
    began = time.perf_counter()
    for number in numbers:
        reader.fill(number, batch)
    whole = time.perf_counter() - began
    count = len(samples)
    return StageSeconds(
        read / count, decode / count, resizing / count, max(0.0, whole - read - decode - resizing) / count
    )
