"""The rows of metrics.jsonl: rates by a clock and counts made by hand, and means over all of an interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_scale import train
from nepa_scale.objectives import effective_rank
from nepa_scale.sharding import World
from nepa_scale.training import metrics
from nepa_scale.training.metrics import SPECTRA, Costs, Meter
from tests.launch import TINY, write_shards
from tests.launch import metrics as rows_of

NAN = float("nan")
COSTS = Costs(train_flops_per_image=6e9, tokens_per_image=10, peak_flops=3e12)
OF_TIME = {"images_per_second", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "peak_memory_bytes"}


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Iterator[dict[str, float]]:
    """What the other one of two ranks sends (what it does not name: the same). Sending takes 3 seconds."""
    other: dict[str, float] = {}

    def sent(values: dict[str, Tensor]) -> dict[str, list[float]]:
        clock.now += 3
        return {name: [float(value), other.get(name, float(value))] for name, value in values.items()}

    monkeypatch.setattr(metrics, "numbers_of_ranks", sent)
    monkeypatch.setattr(metrics, "_peak_memory", lambda _device: 500.0)
    return other


def meter(clock: Clock, **settings: Any) -> Meter:
    """Of two ranks that step 40 images each, 5 steps an epoch."""
    return Meter(World(0, 2, 0, torch.device("cpu")), COSTS, 80, 5, clock=clock, **settings)


def step(meter: Meter, *losses: float, norm: float = 1.0, refused: bool = False, data: float = 0.0) -> None:
    """One step, whose micro-batches have these losses."""
    for loss in losses or (-0.5,):
        meter.add_micro_batch(torch.tensor(loss), {"of_loss": torch.tensor(2 * loss)})
    meter.add_step(
        torch.tensor(norm), refused=torch.tensor(refused), sound=torch.tensor(True), keys=["a"], data_seconds=data
    )


def test_rates_and_counts_follow_from_clock_and_steps(clock: Clock, two_ranks: dict[str, float]) -> None:
    two_ranks |= {"data_seconds": 1.0, "peak_memory_bytes": 700.0}
    found = meter(clock)
    for _ in range(4):
        clock.now += 5
        step(found, -0.5, -0.7, data=0.5)
    found.pause(7.0)
    row, bad = found.row(24, lr=0.1)
    assert bad == []
    # 4 steps of 80 images, in 4 x 5 seconds and 3 of sending, of which 7 were a pause
    assert row["step_seconds"] == pytest.approx(16 / 4)
    assert row["images_per_second"] == pytest.approx(4 * 80 / 16)
    assert row["tokens_per_second"] == pytest.approx(4 * 80 * 10 / 16)
    assert row["mfu"] == pytest.approx(20 * 6e9 / (2 * 3e12))  # of two devices
    assert row["data_seconds"] == pytest.approx((4 * 0.5 + 1.0) / 2 / 4)  # the mean of the ranks, a step
    assert row["peak_memory_bytes"] == 700  # the fuller rank's
    assert row["step"] == 24
    assert row["samples_seen"] == 24 * 80
    assert row["tokens_seen"] == 24 * 80 * 10
    assert row["flops_seen"] == pytest.approx(24 * 80 * 6e9)
    assert row["epoch"] == pytest.approx(24 / 5)
    assert row["lr"] == 0.1
    assert row["skipped_steps"] == 0


@pytest.mark.usefixtures("two_ranks")
def test_a_row_ends_where_the_next_begins(clock: Clock) -> None:
    """The wait for the device belongs to one row only, and so do pauses and the steps' numbers."""
    found = meter(clock)
    step(found, -0.1, data=5.0)
    found.pause(1.0)
    found.row(1, lr=0.1)
    for _ in range(2):
        clock.now += 10
        step(found, -0.3)
    row, _ = found.row(3, lr=0.1)
    assert row["step_seconds"] == pytest.approx((20 + 3) / 2)
    assert row["loss"] == pytest.approx(-0.3)
    assert row["data_seconds"] == 0


@pytest.mark.usefixtures("two_ranks")
def test_mfu_is_null_where_the_peak_is_not_known(clock: Clock) -> None:
    found = Meter(World(0, 2, 0, torch.device("cpu")), Costs(6e9, 10, None), 80, 5, clock=clock)
    clock.now += 1
    step(found)
    assert found.row(1, lr=0.1)[0]["mfu"] is None


def test_means_are_over_micro_batches_steps_and_ranks(clock: Clock, two_ranks: dict[str, float]) -> None:
    two_ranks |= {"loss": -0.9, "of_loss": -1.0}
    found = meter(clock)
    step(found, -0.1, -0.3, norm=1.0)
    step(found, -0.5, -0.7, norm=4.0)
    row, _ = found.row(2, lr=0.1)
    assert row["loss"] == pytest.approx((-0.4 - 0.9) / 2)
    assert row["of_loss"] == pytest.approx((-0.8 - 1.0) / 2)
    assert row["grad_norm"] == pytest.approx(2.5)


@pytest.mark.usefixtures("two_ranks")
def test_a_skipped_step_counts_for_no_mean(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    found = meter(clock, micro_batches=6)
    ranks = []
    for number, refused in enumerate((False, True, False)):
        for micro_batch in range(2):
            targets = torch.randn(20, 6, generator=torch.Generator().manual_seed(2 * number + micro_batch))
            loss = torch.tensor(NAN if refused else -0.1 * number)
            if refused:
                targets.fill_(NAN)
            else:
                ranks.append(effective_rank(targets).item())
            found.add_micro_batch(loss, {"of_loss": 2 * loss}, lambda rows=targets: rows)
        found.add_step(
            torch.tensor(math.inf if refused else 1.0 + number), refused=torch.tensor(refused),
            sound=torch.tensor(True), keys=[str(number)], data_seconds=0.0,
        )  # fmt: skip
    assert [bool(sound) for sound in found.window.sound] == [True, False, True]  # by the loss, where the gradient was
    monkeypatch.setattr(Meter, "_name_bad_steps", lambda *_: [])
    row, _ = found.row(3, lr=0.1)
    assert row["skipped_steps"] == 1
    assert row["loss"] == pytest.approx(-0.1)
    assert row["of_loss"] == pytest.approx(-0.2)
    assert row["grad_norm"] == pytest.approx(2.0)
    assert row["effective_rank"] == pytest.approx(sum(ranks) / 4)


@pytest.mark.usefixtures("two_ranks")
def test_where_all_steps_were_skipped_there_are_no_means(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "_name_bad_steps", lambda *_: [])
    found = meter(clock)
    clock.now += 1
    step(found, refused=True)
    row, _ = found.row(1, lr=0.1)
    assert row["loss"] is row["of_loss"] is row["grad_norm"] is None
    assert row["skipped_steps"] == 1


@pytest.mark.usefixtures("two_ranks")
def test_spectra_are_taken_of_a_few_micro_batches_spread_over_the_interval(clock: Clock) -> None:
    found = meter(clock, micro_batches=40)
    asked: list[int] = []

    def targets(number: int) -> Tensor:
        asked.append(number)
        return torch.eye(4) if number % 2 else torch.eye(4)[:1].expand(4, 4)

    for number in range(40):
        found.add_micro_batch(torch.tensor(0.0), {}, lambda number=number: targets(number))
        if number % 2:
            found.add_step(
                torch.tensor(1.0), refused=torch.tensor(False), sound=torch.tensor(True), keys=[], data_seconds=0.0
            )
    row, _ = found.row(20, lr=0.1)
    assert asked == list(range(0, 40, 40 // SPECTRA))
    assert row["effective_rank"] == pytest.approx((4 + 1) / 2, rel=1e-4)


def test_all_of_a_row_are_means_over_its_interval(tmp_path: Path) -> None:
    """One run logged at every step and the same at every third: with two micro-batches a step, and masks and copies."""
    shards, found = write_shards(tmp_path / "shards"), {}
    for every in (1, 3):
        run = tmp_path / f"every_{every}"
        arguments = [*TINY, f"data.train={shards}", f"output={run}", f"train.log_every={every}", "checkpoint.every=0"]
        assert train.main([*arguments, "train.micro_batch_size=4", "objective.mask_ratio=0.3"]) == 0
        found[every] = rows_of(run)
    for number, row in enumerate(found[3]):
        interval = found[1][3 * number : 3 * number + 3]
        of_steps = {"step", "epoch", "samples_seen", "tokens_seen", "flops_seen", "lr", "skipped_steps"}
        means = row.keys() - OF_TIME - of_steps
        assert means >= {"loss", "one_plus_loss", "centred_loss", "copy_win", "effective_rank", "target_cosine"}
        for name in means:
            assert row[name] == pytest.approx(sum(one[name] for one in interval) / 3, rel=1e-6), name
        assert row["one_plus_loss"] == pytest.approx(1 + row["loss"], abs=1e-9)
        assert row["centred_loss"] == pytest.approx(1 - row["centred_cosine"], abs=1e-6)
