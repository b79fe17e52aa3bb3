"""What must not slow a step: waits for the device, garbage collection in its midst."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_scale import train
from nepa_scale.training.garbage import collect_garbage, garbage_on_request
from tests.launch import TINY, metrics, write_shards

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The functions on the stack, the innermost last, whenever Python reads a tensor's values."""
    seen: list[tuple[str, ...]] = []

    def watched(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(tuple(frame.name for frame in traceback.extract_stack()[:-1]))
            return original(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, watched(name))
    return seen


def test_a_step_waits_for_its_device_once_a_logged_row(tmp_path: Path, reads: list[tuple[str, ...]]) -> None:
    """On a CPU a wait costs nothing, but what would wait on a GPU is the same: reading values."""
    arguments = [
        *TINY, f"data.train={write_shards(tmp_path / 'shards')}", f"output={tmp_path / 'run'}", "train.steps=20",
        "train.log_every=10", "train.spike_factor=3", "objective.mask_ratio=0.4", "model.drop_path=0.1",
        "checkpoint.every=0", "evaluate.every=0",
    ]  # fmt: skip
    assert train.main(arguments) == 0
    assert len(metrics(tmp_path / "run")) == 2
    aside = {"save", "evaluate", "mark_best", "finish", "close"}  # `Agreement.finish` reads a tensor of the host
    in_steps = [stack for stack in reads if "train_on" in stack and not aside & set(stack)]
    assert [stack[-1] for stack in in_steps] == ["numbers_of_ranks"] * 2


def test_garbage_is_collected_only_when_asked_for() -> None:
    collections: list[str] = []

    def watch(phase: str, _info: dict[str, int]) -> None:
        collections.append(phase)

    class Node:
        other: Any = None

    with garbage_on_request():
        gc.callbacks.append(watch)
        try:
            kept = [Node() for _ in range(100_000)]  # far above the thresholds
            for node in kept:
                node.other = node
            assert collections == []
            collect_garbage()
            assert collections == ["start", "stop"]
        finally:
            gc.callbacks.remove(watch)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert torch.is_grad_enabled()
