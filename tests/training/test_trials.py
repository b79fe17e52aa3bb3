"""A few of the random trials; docs/fault_tolerance.md has the count of all that were made."""

from __future__ import annotations

import random

import pytest

from tests.training.trials import Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"), ("single", "fsdp", "zero3"), launchers=False)


@pytest.mark.parametrize("number", range(5))
def test_a_run_survives_a_signal(number: int, trials: Trials) -> None:
    trials.signals(number, random.Random(f"suite {number}"))


@pytest.mark.parametrize("number", range(5))
def test_a_run_survives_a_kill(number: int, trials: Trials) -> None:
    trials.kills(number, random.Random(f"suite {number}"))
