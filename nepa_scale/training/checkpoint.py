"""Checkpoints of a run: written in the background by all ranks, complete or invisible, readable by any other layout.

The files are described in `checkpoint_format`. A save goes through these steps, and may die between any two of them:

1. every rank copies its state to host memory; training goes on from here
2. every rank writes its part into `.tmp_step_N/` and waits until it is on the disk
3. all ranks tell each other how that went
4. rank 0 adds `meta.json` and `index.json`, renames the folder to `step_N/`, points `latest` at it, and removes
   checkpoints that are no longer to be kept (each hidden by a rename first)

The rename is the moment at which the checkpoint comes to exist. What a dead save left behind is hidden by its name, and
removed by the next job of the run.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nepa_scale.config import ConfigError
from nepa_scale.interop.official import CONFIG, timm_architecture
from nepa_scale.sharding.shard import Shard
from nepa_scale.training.checkpoint_format import (
    INDEX,
    META,
    build_index,
    everywhere,
    find_damage,
    first,
    load_shards,
    read_meta,
    sync_folder,
    write_index,
    write_meta,
)
from nepa_scale.training.fault_injection import fault_point
from nepa_scale.training.part_files import PartImage
from nepa_scale.training.versions import package_version

__all__ = [
    "CheckpointFailure",
    "Checkpointer",
    "find_checkpoint",
    "find_checkpoint_before",
    "load_shards",
    "locate_checkpoint",
    "read_meta",
]

_STEP = re.compile(r"step_(\d{8,})")
_HIDDEN, _REPLACED = ".tmp_", ".old_"
_LEFT = "left_"  # of a history that the run went back before: never resumed from by itself
# the background group's: generous, since a rank may write for minutes before it has something to say
_PATIENCE = timedelta(minutes=30)


class CheckpointFailure(RuntimeError):
    """A checkpoint could not be written, and the run was asked to stop in that case."""


@dataclass(frozen=True)
class _Problem:
    """Why a save failed. A mistake (as opposed to a full disk) is nothing to go on with."""

    reason: str
    mistake: bool


class Checkpointer:
    """Writes the checkpoints of one run; all ranks make one, and make its collective calls in the same order.

    run: the run folder, on a file system that all ranks share
    keep: newest checkpoints kept; `keep_every`: those of its multiples are kept as well (0: none), as is the best
    stop_on_failure: whether a save that fails stops the run; otherwise it is a warning
    Raises:
        ConfigError: some rank cannot write the folder.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        keep_every: int = 0,
        rank: int,
        world_size: int,
        stop_on_failure: bool = False,
    ) -> None:
        self.folder = run / "checkpoints"
        self.keep, self.keep_every = keep, keep_every
        self.rank, self.world_size = rank, world_size
        self.stop_on_failure = stop_on_failure
        self._image: PartImage | None = None
        self._pending: list[Future[None]] = []
        self._failure: str | None = None  # what `wait` has to raise
        self._lost: RuntimeError | None = None  # the same, where other ranks are gone
        # a group of its own: collectives of one group must come in the same order everywhere, and the loop has its own
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None
        problem: _Problem | None = first(self._exchange(self._attempt(self._prepare)))
        if problem is not None:
            raise ConfigError(
                f"cannot write checkpoints to {self.folder}: {problem.reason}; choose another folder (output=)"
            )
        # one thread: its jobs run in order, so that what they touch needs no lock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f"{_HIDDEN}probe_{self.rank}"
        probe.write_bytes(b"writable?")
        probe.unlink()
        if self.rank == 0:
            _clean_up(self.folder)

    def reserve(self, shards: list[Shard], *, replicated: bool) -> None:
        """Takes the host memory of all saves now: whether there is enough is known before the first step, and already
        the first save stalls for no more than the copy. `save` does it where this was not called."""
        share = (self.rank, self.world_size) if replicated else (0, 1)
        if self._image is None or not self._image.fits(shards, share):
            self._image = None  # frees the old one first
            self._image = PartImage(shards, share)

    def save(self, step: int, shards: list[Shard], *, replicated: bool, meta: dict[str, Any]) -> None:
        """Starts the checkpoint of `step`; returns when the state has been copied. Collective.

        Waits for the save before it, if that is still being written.

        replicated: every rank holds everything, and writes an equal share of it
        meta: fit for JSON; `read_meta` returns it
        Raises:
            CheckpointFailure: as `wait`, of the save before this one.
            TypeError: `meta` is not fit for JSON.
        """
        self.wait()
        json.dumps(meta)
        fault_point("save-begun")

        def copy() -> None:
            self.reserve(shards, replicated=replicated)
            assert self._image is not None
            self._image.copy_from(shards)

        problem = self._attempt(copy)
        fault_point("save-copied")
        shapes = {shard.name: tuple(shard.shape) for shard in shards}
        meta = meta | {
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: package_version(name) for name in ("nepa_scale", "torch")},
        }
        self._pending.append(self._thread.submit(self._save, step, self._image, shapes, meta, problem))

    def wait(self) -> None:
        """Returns when everything asked for is on the disk, or has failed with a warning.

        Raises:
            CheckpointFailure: a save failed, and `stop_on_failure`; or by a mistake, such as shards that leave gaps.
                All ranks raise it alike.
            RuntimeError: torch's, of a collective: other ranks are gone.
        """
        pending, self._pending = self._pending, []
        for job in pending:
            job.result()
        if self._lost is not None:
            raise self._lost
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointFailure(failure)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; one still being written is not."""
        found = _complete(self.folder)
        return found[-1] if found else None

    def best(self) -> dict[str, Any] | None:
        """{"step", "metric", "value"} of the best checkpoint so far, also that of the job before, and "weights", those
        that were evaluated, where they were named; None without one."""
        return _read_best(self.folder)

    def mark_best(
        self, step: int, metric: str, value: float, *, weights: str | None = None, if_better: bool = False
    ) -> None:
        """Keeps the checkpoint of `step`, saved or being saved, until another is marked, and points `best` at it.
        Collective; returns at once, and fails as a save does.

        weights: that the value is of, "raw" or "ema"
        if_better: only where `value` is above the present best's, of the same metric
        """
        best = {"step": step, "metric": metric, "value": value} | ({"weights": weights} if weights else {})
        self._pending.append(self._thread.submit(self._mark_best, best, if_better))

    def go_back(self, step: int) -> None:
        """Leaves the history after `step`: checkpoints of later steps are removed, or set aside where they are to be
        kept for good. Collective.

        Raises:
            CheckpointFailure: that cannot be done.
        """
        self.wait()
        problem: _Problem | None = first(
            self._exchange(self._attempt(lambda: self._leave_behind(step) if self.rank == 0 else None))
        )
        if problem is not None:
            raise CheckpointFailure(f"checkpoints after step {step} cannot be removed: {problem.reason}")

    def close(self) -> None:
        """Finishes what is pending; raises nothing that `wait` would."""
        self._thread.shutdown(wait=True)
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self._image = None, None

    # in the background from here on

    def _save(
        self,
        step: int,
        image: PartImage | None,
        shapes: dict[str, tuple[int, ...]],
        meta: dict[str, Any],
        problem: _Problem | None,
    ) -> None:
        """problem: why this rank has nothing to write"""
        name = f"step_{step:08d}"
        try:
            problem = self._write(name, image, shapes, meta, problem)
        except RuntimeError as error:
            self._lost = error
            return
        if problem is not None:
            previous = self.latest()
            self._report(
                problem,
                f"checkpoint {name} was not written: {problem.reason}. The newest complete one is "
                f"{previous if previous else 'none'}",
            )

    def _report(self, problem: _Problem, message: str) -> None:
        if problem.mistake or self.stop_on_failure:
            self._failure = message
        elif self.rank == 0:
            _warn(message)

    def _write(
        self, name: str, image: PartImage | None, shapes: Any, meta: dict[str, Any], problem: _Problem | None
    ) -> _Problem | None:
        """Steps 2 to 4 of the module's docstring; why that failed, the same on all ranks, or None."""
        temporary = self.folder / f"{_HIDDEN}{name}"

        def make_folder() -> None:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # of a save that failed
                temporary.mkdir()

        def write_part() -> None:
            assert image is not None
            written.append(image.write(temporary / f"part_{self.rank:05d}.safetensors"))

        def publish() -> None:
            if self.rank == 0:
                parts, pieces, held = ([item[i] for item in described] for i in range(3))
                index = build_index(parts, pieces, {k: v for shapes in held for k, v in shapes.items()})
                fault_point("commit-agreed")
                write_meta(temporary, meta)
                fault_point("commit-meta")
                write_index(temporary, index)
                fault_point("commit-index")
                self._publish(temporary, name)

        written: list[Any] = []
        problem = first(self._exchange(problem or self._attempt(make_folder)))
        if problem is None:
            problem = first(self._exchange(self._attempt(write_part)))
        if problem is None:
            assert image is not None
            described = self._exchange((written[0], image.pieces, shapes))
            problem = self._attempt(publish)
        if problem is not None and self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        agreed: _Problem | None = first(self._exchange(problem))
        return agreed

    def _publish(self, temporary: Path, name: str) -> None:
        sync_folder(temporary)
        fault_point("commit-synced")
        final = self.folder / name
        replaced = self.folder / f"{_REPLACED}{name}"
        if final.exists():
            final.rename(replaced)
            fault_point("commit-replacing")
        temporary.rename(final)
        sync_folder(self.folder)
        fault_point("commit-renamed")
        _point("latest", final)
        sync_folder(self.folder)
        fault_point("commit-latest")
        shutil.rmtree(replaced, ignore_errors=True)
        self._retire(final)

    def _retire(self, newest: Path) -> None:
        """Removes what retention does not keep, now that `newest` is there."""
        self._leave_behind(_step(newest))
        for path in _complete(self.folder)[: -self.keep]:
            if not self._is_kept(path):
                self._remove(path)
        fault_point("retention-done")

    def _leave_behind(self, step: int) -> None:
        later = [path for path in _complete(self.folder) if _step(path) > step]
        if not later:
            return
        kept = [path for path in later if self._is_kept(path)]
        aside = f"; {', '.join(p.name for p in kept)} is kept as {_LEFT}{kept[0].name}" if kept else ""
        _warn(f"removing {', '.join(p.name for p in later)}: the run went back to {step}, before them{aside}")
        best = _read_best(self.folder)
        if best is not None and best["step"] > step:
            _unlink(self.folder / "best", self.folder / "best.json")
        for path in reversed(later):  # the newest first: a death here leaves none that a resume would prefer
            if path in kept:
                left = self.folder / f"{_LEFT}{path.name}"
                shutil.rmtree(left, ignore_errors=True)  # of a step that was left before
                path.rename(left)
            else:
                self._remove(path)
        remaining = _complete(self.folder)
        if remaining:
            _point("latest", remaining[-1])
        sync_folder(self.folder)

    def _is_kept(self, path: Path) -> bool:
        """Whether the checkpoint is kept though there are newer ones."""
        best = _read_best(self.folder)
        milestone = self.keep_every > 0 and _step(path) % self.keep_every == 0
        return milestone or (best is not None and best["step"] == _step(path))

    def _remove(self, path: Path) -> None:
        hidden = self.folder / f"{_HIDDEN}{path.name}"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        fault_point("retention-hidden")
        shutil.rmtree(hidden, ignore_errors=True)

    def _mark_best(self, found: dict[str, Any], if_better: bool) -> None:
        step, metric, value = found["step"], found["metric"], found["value"]
        path = self.folder / f"step_{step:08d}"

        def mark() -> None:
            best = _read_best(self.folder)
            if self.rank > 0 or (if_better and best and best["metric"] == metric and best["value"] >= value):
                return
            if not path.is_dir():
                _warn(f"{metric}={value:g} is the best so far, but there is no checkpoint {path.name} to keep")
                return
            temporary = self.folder / f"{_HIDDEN}best.json"
            temporary.write_text(json.dumps(found) + "\n")
            temporary.replace(self.folder / "best.json")
            _point("best", path)

        try:
            problem: _Problem | None = first(self._exchange(self._attempt(mark)))
        except RuntimeError as error:
            self._lost = error
            return
        if problem is not None:
            self._report(problem, f"{path.name} could not be marked as the best by {metric}: {problem.reason}")

    def _attempt(self, action: Callable[[], None]) -> _Problem | None:
        """Runs `action`; why that failed, whatever it was: the other ranks are waiting to hear of it."""
        where = f" on rank {self.rank}" if self.world_size > 1 else ""
        try:
            action()
        except OSError as error:
            return _Problem(
                f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}{where}", False
            )
        except Exception as error:
            return _Problem(f"{type(error).__name__}: {error}{where}", True)
        return None

    def _exchange(self, value: Any) -> list[Any]:
        """Every rank's `value`, over the group of the background."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to start afresh. Collective where torch.distributed is initialised.

    resume: "none"; "auto", the newest in the run folder that is not damaged (those that are, are named in a warning);
        or the path of a checkpoint, or of a run folder, whose newest it then is
    Raises:
        ConfigError: the path holds no checkpoint, or all that there are are damaged.
    """
    if resume == "none":
        return None
    place = run if resume == "auto" else Path(resume)
    candidates, problem = everywhere(_candidates(place, resume))[0]
    if problem is not None:
        raise ConfigError(problem)
    return _newest_sound(candidates, place)


def find_checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest checkpoint of the run folder, not damaged, of a step before `step`; None without one. Collective.

    Raises:
        ConfigError: all that there are are damaged.
    """
    candidates = everywhere([path for path in _complete(run / "checkpoints") if _step(path) < step])[0]
    return _newest_sound(candidates, run)


def _newest_sound(candidates: list[Path], place: Path) -> Path | None:
    damages = []
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            return path
        damages.append(damage)
        if not dist.is_initialized() or dist.get_rank() == 0:
            _warn(f"skipping the checkpoint {path}: {damage}")
    if damages:
        raise ConfigError(f"no usable checkpoint in {place}: {damages[0]}; remove it to start afresh")
    return None


def locate_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`, or the newest of the run folder that it is; nothing of it is read yet.

    Raises:
        ConfigError: there is none.
    """
    found, _ = _candidates(Path(path), str(path))
    if not found:
        raise ConfigError(f"{path} {_instead(Path(path))}: give a step_N folder, or a run folder that has some")
    return found[-1]


def _candidates(place: Path, resume: str) -> tuple[list[Path], str | None]:
    """The checkpoints at `place`, oldest first, or what is wrong with it."""
    if (place / INDEX).is_file() or (place / META).is_file():
        return [place.resolve()], None
    found = _complete(place / "checkpoints") or _complete(place)
    if not found and resume != "auto":
        return [], (
            f"train.resume={resume} {_instead(place)}: give a step_N folder, a run folder with checkpoints, or auto"
        )
    return found, None


def _instead(folder: Path) -> str:
    """What a folder without checkpoints holds."""
    if timm_architecture(folder) is not None:
        return "holds weights exported for timm, and no checkpoint"
    if (folder / CONFIG).is_file():
        return "holds weights in the official layout, and no checkpoint"
    return "holds no checkpoint"


def _complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by step: what bears the final name is complete."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _clean_up(folder: Path) -> None:
    """Removes what saves that died have left; a checkpoint that was being replaced comes back."""
    for path in folder.glob(f"{_REPLACED}step_*"):
        final = folder / path.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in folder.glob(f"{_HIDDEN}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif not path.name.startswith(f"{_HIDDEN}probe_"):
            _unlink(path)


def _read_best(folder: Path) -> dict[str, Any] | None:
    try:
        best: dict[str, Any] = json.loads((folder / "best.json").read_text())
    except (OSError, ValueError):
        return None
    return best


def _point(name: str, target: Path) -> None:
    """Makes the link `name` beside `target` point at it, in one go."""
    temporary = target.parent / f"{_HIDDEN}{name}"
    _unlink(temporary)
    temporary.symlink_to(target.name)
    temporary.replace(target.parent / name)


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
