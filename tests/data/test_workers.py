"""Processes that fill batches: in order, never overwriting what is in use, and gone when their user is."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nepa_scale.data.shared_slots import Pixels, SharedSlots
from nepa_scale.data.workers import WorkerDied, Workers

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Numbers:
    """Fills a batch with its number; does what `trouble` says at batch 3."""

    trouble: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, 3)

    def fill(self, number: int, pixels: Pixels) -> tuple[int, int, bool]:
        if number == 3 and self.trouble == "raise":
            raise KeyError("the reason")
        if number == 3 and self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        pixels[...] = number
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        return number, os.getpid(), ignored and torch.get_num_threads() == 1


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("count", [1, 3])
def test_batches_come_in_order_from_processes_that_start_once(count: int) -> None:
    workers = Workers(Numbers(), iter(range(20)), count)
    found = [(int(pixels[1, 2]), *rest) for pixels, rest in workers]
    assert [number for number, *_ in found] == [number for _, number, *_ in found] == list(range(20))
    assert len({pid for *_, pid, _ in found}) == count
    assert all(ready for *_, ready in found)
    assert not any(alive(pid) for *_, pid, _ in found)  # they end with the numbers


def test_batches_that_are_kept_are_not_overwritten() -> None:
    workers = Workers(Numbers(), iter(range(200)), 2)
    kept = [torch.from_numpy(next(workers)[0]) for _ in range(40)]
    for number in range(40, 120):  # let go of at once: their memory is used again
        assert (next(workers)[0] == number).all()
    workers.close()
    gc.collect()
    assert [int(batch[0, 0]) for batch in kept] == list(range(40))
    assert all((batch == batch[0, 0]).all() for batch in kept)


def test_batches_are_copied_only_for_a_reader_that_keeps_them() -> None:
    workers = Workers(Numbers(), iter(range(80)), 2)
    for _ in range(50):
        pixels, _ = next(workers)
        assert not is_copy(pixels)
    kept = [pixels] + [next(workers)[0] for _ in range(10)]  # more than there are slots
    assert [is_copy(pixels) for pixels in kept] == sorted(is_copy(pixels) for pixels in kept)
    assert is_copy(kept[-1])
    workers.close()


def is_copy(pixels: Pixels) -> bool:
    """Whether the array lies in memory of its own, not in what the workers share."""
    base: object = pixels
    while isinstance(base, np.ndarray):
        base = base.base
    return not isinstance(base, mmap.mmap | memoryview)


def test_a_view_or_a_tensor_keeps_its_slot() -> None:
    slots = SharedSlots(1, (4,))
    slot = slots.take()
    assert slot == 0
    tensor = torch.from_numpy(slots.lend(slot))[1:].view(3, 1)
    assert slots.take() is None
    del tensor
    assert slots.take() == 0
    array = slots.lend(0)
    array[:] = 7
    assert (slots.array(0) == 7).all()
    del slots
    assert (array == 7).all()  # the memory outlives the object


def test_an_error_in_a_worker_is_raised_with_its_traceback() -> None:
    workers = Workers(Numbers("raise"), iter(range(20)), 2)
    assert [int(next(workers)[0][0, 0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"the reason"):
        next(workers)
    workers.close()


def test_the_death_of_a_worker_is_noticed() -> None:
    workers = Workers(Numbers("die"), iter(range(20)), 2)
    assert [int(next(workers)[0][0, 0]) for _ in range(3)] == [0, 1, 2]
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        next(workers)
    assert time.monotonic() - began < 10
    workers.close()


SCRIPT = """
import multiprocessing, sys, time
from nepa_scale.data.workers import Workers
from tests.data.test_workers import Numbers

def main():
    multiprocessing.set_forkserver_preload(["nepa_scale.data"])
    workers = Workers(Numbers(), iter(range(10**6)), 2)
    print(*{next(workers)[1][1] for _ in range(6)}, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    if sys.argv[1] == "fail":
        raise KeyError("with workers running")
    globals()["kept"] = workers  # never closed

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("ending", "status"), [("SIGKILL", -9), ("exit", 0), ("fail", 1)])
def test_workers_end_with_their_user_however_it_ends(tmp_path: Path, ending: str, status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), "wait" if ending.startswith("SIG") else ending],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if ending.startswith("SIG"):
        for pid in pids:
            os.kill(pid, signal.SIGTERM)  # what a scheduler sends to all processes of a job
        time.sleep(0.2)
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.Signals[ending])
    assert process.wait(30) == status
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_slots_are_shared_memory_of_the_right_shape() -> None:
    slots = SharedSlots(3, (2, 5))
    arrays = [slots.array(slot) for slot in range(3)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert all(array.shape == (2, 5) for array in arrays)
    assert [int(np.unique(array)[0]) for array in arrays] == [0, 1, 2]
    assert sorted(slots.take() or 0 for _ in range(3)) == [0, 1, 2]
    assert slots.take() is None
