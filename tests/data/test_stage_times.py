"""The stages of preparing a sample, timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nepa_scale.config import DataConfig
from nepa_scale.data import ShardSet
from nepa_scale.data.order import EvaluationOrder
from nepa_scale.data.sample_reader import SampleReader
from nepa_scale.data.stage_times import measure_stages
from tests.launch import write_shards


def test_the_slow_stage_is_found(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_shards(tmp_path / "shards")), DataConfig())
    calls: list[int] = []

    def slow_crop(image: object, key: int, out: object) -> None:  # noqa: ARG001
        calls.append(sum(range(100_000)))

    order = EvaluationOrder(40, batch_size=10, rank=0, world_size=1)
    reader = SampleReader(
        shards,
        order,
        size=(32, 32),
        crop=slow_crop,
        interpolation="bilinear",
        flip=True,
        seed=0,
        classes=None,
        need_labels=False,
    )
    found = measure_stages(reader, range(4), (0.08, 1.0), (0.75, 4 / 3))
    assert len(calls) == 40
    assert min(found.read, found.decode, found.resize) > 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["rest"] > 0.5  # what is in no other stage
    assert found.total < 0.5
