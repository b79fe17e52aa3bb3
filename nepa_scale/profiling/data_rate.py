"""How fast the data stream is, and where its time goes."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data import ShardSet, TrainStream
from nepa_scale.data.stage_times import measure_stages


@dataclass(frozen=True)
class DataRate:
    """Measured rates of a data stream.

    images_per_second: of the stream as configured, with `workers` processes; median of the rounds
    spread: least and largest of the rounds
    images_per_second_per_core: of one process that does nothing else
    stages: share of that process's time, 0..1, by stage (see `StageSeconds`)
    """

    images_per_second: float
    spread: tuple[float, float]
    workers: int
    images_per_second_per_core: float
    stages: dict[str, float]


def to_facts(rate: DataRate) -> dict[str, Any]:
    """As the tool writes them."""
    return {"data_only": True, **asdict(rate)}


def measure_data_rate(
    shards: ShardSet,
    data: DataConfig,
    image_size: tuple[int, int],
    *,
    batch_size: int = 64,
    batches: int = 30,
    rounds: int = 5,
    seed: int = 0,
) -> DataRate:
    """Reads training batches of this machine's own stream, after as many as warm it up; takes some seconds.

    Raises:
        ConfigError: the set is smaller than a batch.
    """  # fmt: skip
    if len(shards) < batch_size:
        raise ConfigError(f"data.train holds {len(shards)} images, and the measurement takes batches of {batch_size}")
    stream = TrainStream(
        shards, data, image_size=image_size, global_batch_size=batch_size, micro_batch_size=batch_size, seed=seed,
        rank=0, world_size=1,
    )  # fmt: skip
    try:
        iterator = iter(stream)
        deque(islice(iterator, 4 * max(1, data.workers)), maxlen=0)
        rates = []
        for _ in range(rounds):
            began = time.perf_counter()
            deque(islice(iterator, batches), maxlen=0)
            rates.append(batches * batch_size / (time.perf_counter() - began))
    finally:
        stream.close()
    scale, ratio = (data.crop_scale[0], data.crop_scale[1]), (data.crop_ratio[0], data.crop_ratio[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        measure_stages(stream.reader, range(1), scale, ratio)
        stages = measure_stages(stream.reader, range(max(1, batches // 3)), scale, ratio)
    finally:
        torch.set_num_threads(threads)
    return DataRate(
        images_per_second=statistics.median(rates),
        spread=(min(rates), max(rates)),
        workers=data.workers,
        images_per_second_per_core=1 / stages.total,
        stages=stages.shares,
    )
