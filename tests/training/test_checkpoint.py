"""Saves that die, fail, or succeed: the checkpoints of a run are complete or invisible."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nepa_scale.config import ConfigError
from nepa_scale.sharding.shard import Shard
from nepa_scale.training import part_files
from nepa_scale.training.checkpoint import Checkpointer, CheckpointFailure, find_checkpoint, load_shards, read_meta
from nepa_scale.training.fault_injection import FAULT_POINTS, VARIABLE
from nepa_scale.training.part_files import PartImage
from tests.training.checkpoint_ranks import blank, cut, equal, files_in, run_ranks, whole_state

SMALL = {"a": (11, 7), "b": (5,)}
HALF_MEGABYTE = {"a": (257, 127)}


def save_steps(run: Path, *steps: int, keep: int = 10, keep_every: int = 0, best: int | None = None) -> None:
    """One process saves `whole_state(step)` at each step."""
    checkpointer = Checkpointer(run, keep=keep, keep_every=keep_every, rank=0, world_size=1)
    for step in steps:
        checkpointer.save(step, whole_state(step, SMALL), replicated=True, meta={"step": step})
        if step == best:
            checkpointer.mark_best(step, "knn_top1", 0.5)
    checkpointer.wait()
    checkpointer.close()


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def assert_holds(run: Path, step: int, shapes: dict[str, tuple[int, ...]] = SMALL) -> None:
    """What a resume of the run would load is `whole_state(step)`."""
    path = find_checkpoint(run, "auto")
    assert path is not None
    assert read_meta(path)["step"] == step
    expected = whole_state(step, shapes)
    read = blank(expected)
    load_shards(path, read)
    assert equal(read, expected)


def leftovers(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


# dying


def die_at(rank: int, world_size: int, run: str, point: str, again: bool) -> None:
    """Saves steps 1 and 2 (or 1 anew), and dies in the second save where `point` names a place of it."""
    checkpointer = Checkpointer(Path(run), keep=1, rank=rank, world_size=world_size)
    for step, seed in ((1, 1), (1, 2)) if again else ((1, 1), (2, 2)):
        if seed == 2:
            os.environ[VARIABLE] = point
        shards = cut(whole_state(seed, SMALL), rank, world_size, seed)
        checkpointer.save(step, shards, replicated=False, meta={"step": step, "seed": seed})
        checkpointer.wait()
    checkpointer.close()


VISIBLE_FROM = FAULT_POINTS.index("commit-renamed")
ALIKE = [point for point in FAULT_POINTS if point != "commit-replacing"]


@pytest.mark.parametrize("point", ALIKE)
def test_a_death_at_any_point_of_a_save_leaves_a_complete_checkpoint(point: str, tmp_path: Path) -> None:
    assert run_ranks(1, die_at, str(tmp_path), point, False) == [-signal.SIGKILL]
    expected = 2 if FAULT_POINTS.index(point) >= VISIBLE_FROM else 1
    assert_holds(tmp_path, expected)
    assert set(steps_in(tmp_path)) <= {1, 2}
    save_steps(tmp_path, 3)  # the next job cleans up and goes on
    assert leftovers(tmp_path) == []
    assert_holds(tmp_path, 3)


@pytest.mark.parametrize("point", ["part-half", "commit-synced", "commit-replacing", "commit-renamed"])
def test_a_death_while_a_step_is_saved_anew_loses_neither(point: str, tmp_path: Path) -> None:
    assert run_ranks(1, die_at, str(tmp_path), point, True) == [-signal.SIGKILL]
    Checkpointer(tmp_path, keep=1, rank=0, world_size=1).close()
    assert leftovers(tmp_path) == []
    path = find_checkpoint(tmp_path, "auto")
    assert path is not None
    seed = read_meta(path)["seed"]
    assert seed == (2 if point == "commit-renamed" else 1)
    read = blank(whole_state(seed, SMALL))
    load_shards(path, read)
    assert equal(read, whole_state(seed, SMALL))


@pytest.mark.parametrize("point", ["part-half:1:1", "part-synced:1:1", "commit-synced", "commit-renamed"])
def test_when_one_rank_dies_no_rank_publishes_half_a_checkpoint(point: str, tmp_path: Path) -> None:
    codes = run_ranks(2, die_at, str(tmp_path), point, False)
    assert -signal.SIGKILL in codes
    assert_holds(tmp_path, 2 if point == "commit-renamed" else 1)


# failing


def fail_on_one_rank(rank: int, world_size: int, run: str, stop: bool) -> None:
    """The last rank cannot write a large file in the second of three saves."""
    checkpointer = Checkpointer(Path(run), keep=5, rank=rank, world_size=world_size, stop_on_failure=stop)
    folder = Path(run) / "checkpoints"

    def save(step: int) -> None:
        checkpointer.save(step, whole_state(step, HALF_MEGABYTE), replicated=True, meta={"step": step})
        checkpointer.wait()

    save(1)
    before = files_in(folder / "step_00000001")
    if rank == world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    if stop:
        with pytest.raises(CheckpointFailure, match=r"step_00000002 was not written: .*File too large"):
            save(2)
    else:
        save(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert files_in(folder / "step_00000001") == before
    assert checkpointer.latest() == folder / "step_00000001"
    assert not (folder / ".tmp_step_00000002").exists()
    save(3)
    assert checkpointer.latest() == folder / "step_00000003"
    checkpointer.close()


@pytest.mark.parametrize("stop", [False, True], ids=["warning", "stop_on_failure"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failure_on_one_rank_is_shared_and_harms_nothing(
    world_size: int, stop: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(world_size, fail_on_one_rank, str(tmp_path), stop) == [0] * world_size
    assert steps_in(tmp_path) == [1, 3]
    assert leftovers(tmp_path) == []
    assert_holds(tmp_path, 3, HALF_MEGABYTE)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    if stop:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert "step_00000002 was not written" in warnings[0]
        assert "File too large" in warnings[0]
        assert "step_00000001" in warnings[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_old_checkpoints_and_a_warning(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpointer = Checkpointer(small_disk, keep=5, rank=0, world_size=1)
    for step in (1, 2):  # half a megabyte each, and a little more
        checkpointer.save(step, whole_state(step, HALF_MEGABYTE), replicated=True, meta={"step": step})
    checkpointer.wait()
    assert "step_00000002 was not written: No space left on device" in capfd.readouterr().err
    assert leftovers(small_disk) == []
    assert_holds(small_disk, 1, HALF_MEGABYTE)
    shutil.rmtree(small_disk / "checkpoints" / "step_00000001")
    checkpointer.save(3, whole_state(3, HALF_MEGABYTE), replicated=True, meta={"step": 3})
    checkpointer.wait()
    checkpointer.close()
    assert_holds(small_disk, 3, HALF_MEGABYTE)


@pytest.mark.parametrize("stop", [False, True], ids=["warning", "stop_on_failure"])
def test_a_best_that_cannot_be_marked_is_as_a_save_that_fails(
    stop: bool, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpointer = Checkpointer(small_disk, keep=5, rank=0, world_size=1, stop_on_failure=stop)
    checkpointer.save(1, whole_state(1, SMALL), replicated=True, meta={"step": 1})
    checkpointer.wait()
    with (small_disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    checkpointer.mark_best(1, "knn_top1", 0.5)
    if stop:
        with pytest.raises(CheckpointFailure, match=r"step_00000001 could not be marked as the best .*No space left"):
            checkpointer.wait()
    else:
        checkpointer.wait()
        assert "warning: step_00000001 could not be marked as the best by knn_top1" in capfd.readouterr().err
    checkpointer.close()


def copy_fails_on_one_rank(rank: int, world_size: int, run: str) -> None:
    checkpointer = Checkpointer(Path(run), keep=5, rank=rank, world_size=world_size)
    shards = whole_state(1, SMALL)
    if rank == 1:
        PartImage.copy_from = None  # type: ignore[method-assign, assignment]
    checkpointer.save(1, shards, replicated=True, meta={})
    with pytest.raises(CheckpointFailure, match=r"step_00000001 was not written: TypeError: .* on rank 1"):
        checkpointer.wait()
    checkpointer.close()


def test_a_mistake_on_one_rank_stops_all(tmp_path: Path) -> None:
    assert run_ranks(2, copy_fails_on_one_rank, str(tmp_path), timeout=20) == [0, 0]


def load_fails_on_one_rank(rank: int, _world_size: int, run: str) -> None:
    path = find_checkpoint(Path(run), "auto")
    assert path is not None
    if rank == 1:
        part_files.PartReader.read_into = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigError, match=r"cannot be loaded: TypeError"):
        load_shards(path, whole_state(1, SMALL))
    if rank == 1:
        part_files.PartReader.verify = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigError, match=r"no usable checkpoint in .*: TypeError"):
        find_checkpoint(Path(run), "auto")


def test_a_rank_that_fails_to_load_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    assert run_ranks(2, load_fails_on_one_rank, str(tmp_path), timeout=20) == [0, 0]


def save_nine_of_ten(rank: int, world_size: int, run: str) -> None:
    checkpointer = Checkpointer(Path(run), keep=5, rank=rank, world_size=world_size)
    (shard,) = whole_state(1, {"a": (10,)})
    start, stop = (0, 5) if rank == 0 else (6, 10)
    tensors = {kind: tensor[start:stop] for kind, tensor in shard.tensors.items()}
    checkpointer.save(1, [Shard("a", (10,), start, stop, tensors)], replicated=False, meta={})
    with pytest.raises(CheckpointFailure, match=r"ranges of a .master. leave gaps or overlap on rank 0"):
        checkpointer.wait()
    checkpointer.close()


def test_state_that_does_not_add_up_stops_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, save_nine_of_ten, str(tmp_path)) == [0, 0]
    assert steps_in(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_meta_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=5, rank=0, world_size=1)
    with pytest.raises(TypeError, match="PosixPath"):
        checkpointer.save(1, whole_state(1, SMALL), replicated=True, meta={"output": tmp_path})
    checkpointer.close()


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot write checkpoints to .*File exists"):
        Checkpointer(tmp_path, keep=1, rank=0, world_size=1)


def test_a_read_only_file_system_is_known_at_once(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="Read-only file system"):
        Checkpointer(small_disk, keep=1, rank=0, world_size=1)


# overlapping


def test_a_save_returns_before_it_is_written_and_the_next_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PartImage.write
    running: list[int] = []

    def slow(self: PartImage, path: Path) -> Any:
        running.append(1)
        assert len(running) == 1, "two saves at once"
        time.sleep(0.3)
        part = write(self, path)
        running.pop()
        return part

    monkeypatch.setattr(PartImage, "write", slow)
    checkpointer = Checkpointer(tmp_path, keep=5, rank=0, world_size=1)
    state = whole_state(1, SMALL)
    began = time.perf_counter()
    checkpointer.save(1, state, replicated=True, meta={"step": 1})
    assert time.perf_counter() - began < 0.2
    assert checkpointer.latest() is None
    for shard, changed in zip(state, whole_state(2, SMALL), strict=True):  # training goes on
        for kind, tensor in shard.tensors.items():
            tensor.copy_(changed.tensors[kind])
    checkpointer.save(2, state, replicated=True, meta={"step": 2})
    assert time.perf_counter() - began > 0.3
    assert checkpointer.latest() == tmp_path / "checkpoints" / "step_00000001"
    checkpointer.wait()
    assert checkpointer.latest() == tmp_path / "checkpoints" / "step_00000002"
    checkpointer.close()
    assert_holds(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000002")
    assert_holds(tmp_path, 1)


def train_while_saving(rank: int, world_size: int, run: str) -> None:
    write = PartImage.write

    def slow(self: PartImage, path: Path) -> Any:
        time.sleep(0.2 * (rank + 1))
        return write(self, path)

    PartImage.write = slow  # type: ignore[method-assign]
    checkpointer = Checkpointer(Path(run), keep=5, rank=rank, world_size=world_size)
    for step in (1, 2):
        checkpointer.save(step, whole_state(step, SMALL), replicated=True, meta={"step": step})
        for number in range(50):
            total = torch.tensor(float(rank + number))
            dist.all_reduce(total)
            assert total == 1 + 2 * number
    assert not (Path(run) / "checkpoints" / "step_00000002").exists(), "nothing was left to overlap"
    checkpointer.wait()
    checkpointer.close()


def test_training_talks_between_ranks_while_a_save_does(tmp_path: Path) -> None:
    assert run_ranks(2, train_while_saving, str(tmp_path)) == [0, 0]
    assert_holds(tmp_path, 2)


def leave_without_waiting(rank: int, world_size: int, run: str) -> None:
    checkpointer = Checkpointer(Path(run), keep=5, rank=rank, world_size=world_size)
    checkpointer.save(1, whole_state(1, SMALL), replicated=True, meta={"step": 1})
    raise SystemExit(3)


def test_a_rank_that_leaves_with_a_save_under_way_does_not_hang(tmp_path: Path) -> None:
    assert run_ranks(2, leave_without_waiting, str(tmp_path), timeout=20) == [3, 3]


def test_host_memory_is_reused(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=5, rank=0, world_size=1)
    addresses = set()
    for step in (1, 2, 3):
        checkpointer.save(step, whole_state(step, SMALL), replicated=True, meta={"step": step})
        assert checkpointer._image is not None
        addresses.add(checkpointer._image._buffer.data_ptr())
    checkpointer.close()
    assert len(addresses) == 1


# keeping


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "kept"),
    [(2, 0, None, [50, 60]), (1, 30, None, [30, 60]), (1, 0, 20, [20, 60]), (3, 20, 10, [10, 20, 40, 50, 60])],
)
def test_retention(keep: int, keep_every: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30, 40, 50, 60, keep=keep, keep_every=keep_every, best=best)
    assert steps_in(tmp_path) == kept
    assert leftovers(tmp_path) == []
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_00000060"
    if best is not None:
        assert (tmp_path / "checkpoints" / "best").resolve().name == f"step_{best:08d}"


def test_another_best_frees_the_one_before_also_across_jobs(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, keep=1, best=10)
    save_steps(tmp_path, 30, keep=1)
    assert steps_in(tmp_path) == [10, 30]
    save_steps(tmp_path, 40, 50, keep=1, best=40)
    assert steps_in(tmp_path) == [40, 50]
    checkpointer = Checkpointer(tmp_path, keep=1, rank=0, world_size=1)
    assert checkpointer.best() == {"step": 40, "metric": "knn_top1", "value": 0.5}
    checkpointer.close()


def test_going_back_removes_the_steps_that_were_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 10, 20, 30, keep=3)
    save_steps(tmp_path, 15, keep=3)  # a job that resumed from step 10
    assert steps_in(tmp_path) == [10, 15]
    assert "removing step_00000020, step_00000030: the run went back to 15" in capfd.readouterr().err


def test_what_is_to_be_kept_is_set_aside_when_the_run_goes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 10, 20, 30, 40, keep=4, keep_every=20, best=30)
    checkpointer = Checkpointer(tmp_path, keep=4, keep_every=20, rank=0, world_size=1)
    checkpointer.go_back(10)
    assert checkpointer.latest() == tmp_path / "checkpoints" / "step_00000010"
    assert checkpointer.best() is None
    checkpointer.close()
    assert "step_00000020, step_00000030, step_00000040 is kept as left_step_00000020" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints" / "best").exists()
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_00000010"
    assert_holds(tmp_path, 10)  # a resume does not go on from what was left,
    left = find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "left_step_00000030"))  # unless asked to
    assert left is not None
    assert read_meta(left)["step"] == 30


def test_only_a_better_one_becomes_the_best(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=9, rank=0, world_size=1)
    for step, value in ((1, 0.3), (2, 0.2), (3, 0.4), (4, 0.4)):
        checkpointer.save(step, whole_state(step, SMALL), replicated=True, meta={"step": step})
        checkpointer.mark_best(step, "knn_top1", value, if_better=True)
    checkpointer.wait()
    assert checkpointer.best() == {"step": 3, "metric": "knn_top1", "value": 0.4}
    checkpointer.close()


# finding


def test_auto_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    save_steps(tmp_path, 1)
    assert find_checkpoint(tmp_path, "none") is None


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/step_00000002", "checkpoints/latest"])
def test_a_path_may_name_a_run_or_a_checkpoint(below: str, tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    found = find_checkpoint(tmp_path / "elsewhere", str(tmp_path / below))
    assert found == (tmp_path / "checkpoints" / "step_00000002").resolve()


def test_a_path_that_holds_none_is_named(tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=f"train.resume={place} holds no checkpoint"):
            find_checkpoint(tmp_path / "run", str(place))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["part_00000.safetensors", "index.json", "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_newest_is_named_and_the_one_before_used(
    file: str, how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step_00000002" / file
    if how == "flipped":
        damage(path)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1 if file.startswith("part") else path.stat().st_size // 2)
    else:
        path.unlink()
    assert_holds(tmp_path, 1)
    error = capfd.readouterr().err
    assert "warning: skipping the checkpoint" in error
    assert str(path) in error


def test_when_all_are_damaged_training_does_not_silently_start_afresh(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / f"step_{step:08d}" / "part_00000.safetensors")
    with pytest.raises(ConfigError, match=r"no usable checkpoint in .*step_00000002.* is damaged"):
        find_checkpoint(tmp_path, "auto")
    with pytest.raises(ConfigError, match=r"step_00000001.* is damaged"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step_00000001"))


def find_past_damage(rank: int, world_size: int, run: str) -> None:
    path = find_checkpoint(Path(run), "auto")
    assert path is not None
    expected = cut(whole_state(1), rank, world_size, 5)
    read = blank(expected)
    load_shards(path, read)
    assert equal(read, expected)


def save_two(rank: int, world_size: int, run: str) -> None:
    checkpointer = Checkpointer(Path(run), keep=3, rank=rank, world_size=world_size)
    for step in (1, 2):
        checkpointer.save(step, whole_state(step), replicated=True, meta={"step": step})
    checkpointer.close()


def test_ranks_that_share_the_verification_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, save_two, str(tmp_path)) == [0, 0]
    damage(tmp_path / "checkpoints" / "step_00000002" / "part_00001.safetensors")
    assert run_ranks(2, find_past_damage, str(tmp_path)) == [0, 0]
    assert capfd.readouterr().err.count("warning: skipping the checkpoint") == 1
