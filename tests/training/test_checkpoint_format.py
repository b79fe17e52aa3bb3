"""Any layout reads what any other wrote, and notices what is not what was written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nepa_scale.config import ConfigError
from nepa_scale.sharding.shard import Shard
from nepa_scale.training import part_files
from nepa_scale.training.checkpoint import Checkpointer, find_checkpoint, load_shards, read_meta
from nepa_scale.training.checkpoint_format import build_index, find_damage, read_index, write_index, write_meta
from nepa_scale.training.part_files import FLOAT_BYTES, PartImage
from tests.training.checkpoint_ranks import KINDS, blank, cut, equal, run_ranks, whole_state


def write(folder: Path, held_by_rank: list[list[Shard]], replicated: bool = False) -> Path:
    """A checkpoint of several ranks, written by this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, pieces = [], []
    for rank, shards in enumerate(held_by_rank):
        image = PartImage(shards, (rank, len(held_by_rank)) if replicated else (0, 1))
        image.copy_from(shards)
        parts.append(image.write(folder / f"part_{rank:05d}.safetensors"))
        pieces.append(image.pieces)
    shapes = {shard.name: shard.shape for shards in held_by_rank for shard in shards}
    write_index(folder, build_index(parts, pieces, shapes))
    write_meta(folder, {"step": 1})
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    cuts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5),
    replicated=st.booleans(),
    block=st.sampled_from([64, 256, 4096]),
)
def test_any_ranges_read_what_any_ranges_wrote(
    writers: int,
    readers: int,
    cuts: tuple[int, int],
    shapes: list[list[int]],
    replicated: bool,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    state = whole_state(cuts[0], {f"p{i}": tuple(shape) for i, shape in enumerate(shapes)})
    held = [state if replicated else cut(state, rank, writers, cuts[0]) for rank in range(writers)]
    with pytest.MonkeyPatch.context() as patch:  # blocks so small that ranges cross many of them
        for module in ("part_files", "checkpoint_format"):
            patch.setattr(f"nepa_scale.training.{module}.BLOCK_BYTES", block)
        folder = write(tmp_path_factory.mktemp("checkpoint"), held, replicated)
        assert find_damage(folder) is None
        for rank in range(readers):
            wanted = cut(state, rank, readers, cuts[1])
            everything = wanted + [
                Shard(s.name, s.shape, 0, 0, {kind: torch.empty(0) for kind in KINDS})
                for s in state
                if s.name not in {w.name for w in wanted}
            ]
            read = blank(everything)
            load_shards(folder, read)
            assert equal(read, everything)


def test_part_files_are_plain_safetensors(tmp_path: Path) -> None:
    state = whole_state(1)
    folder = write(tmp_path / "checkpoint", [cut(state, rank, 3, 7) for rank in range(3)])
    seen = {kind: dict.fromkeys((s.name for s in state), 0) for kind in KINDS}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            expected = next(s for s in state if s.name == name).tensors[kind][int(start) : int(start) + len(tensor)]
            assert torch.equal(tensor, expected)
            seen[kind][name] += len(tensor)
    assert seen == {kind: {s.name: s.stop for s in state} for kind in KINDS}


def test_replicated_state_is_written_once(tmp_path: Path) -> None:
    state = whole_state(1)
    folder = write(tmp_path / "checkpoint", [state] * 4, replicated=True)
    size = sum(s.stop for s in state) * FLOAT_BYTES * len(KINDS)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) == pytest.approx(size, rel=0.01)
    assert max(sizes) == pytest.approx(size / 4, rel=0.01)


def test_a_reader_reads_no_more_than_the_blocks_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"p{i}": (1000, 1000) for i in range(8)}
    state = whole_state(1, shapes, ("master",))
    folder = write(tmp_path / "checkpoint", [cut(state, rank, 3, 5) for rank in range(3)])
    read_bytes = 0

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read_bytes
        got = preadv(descriptor, buffers, offset)
        read_bytes += got
        return got

    preadv = os.preadv
    monkeypatch.setattr(part_files.os, "preadv", counting)
    wanted = [Shard(s.name, s.shape, 100, 200, {"master": s.tensors["master"][100:200]}) for s in state]
    read = blank(wanted)
    load_shards(folder, read)
    assert equal(read, wanted)
    assert 0 < read_bytes <= 8 * part_files.BLOCK_BYTES < sum(p.stat().st_size for p in folder.iterdir()) * 1.2
    assert read_bytes < 0.9 * sum(s.stop * FLOAT_BYTES for s in state)


def test_a_missing_average_is_filled_with_the_weights(tmp_path: Path) -> None:
    state = whole_state(1, kinds=KINDS[:3])
    folder = write(tmp_path / "checkpoint", [state])
    read = blank(whole_state(1))
    load_shards(folder, read)
    for got, saved in zip(read, state, strict=True):
        assert torch.equal(got.tensors["ema"], saved.tensors["master"])


def test_kinds_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    state = whole_state(1)
    folder = write(tmp_path / "checkpoint", [state])
    read = [Shard(s.name, s.shape, s.start, s.stop, {"ema": torch.zeros(s.stop)}) for s in state]
    load_shards(folder, read)
    assert all(torch.equal(r.tensors["ema"], s.tensors["ema"]) for r, s in zip(read, state, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes | {"extra": (2,)}, "lacks the parameter extra"),
        (lambda shapes: {k: v for k, v in shapes.items() if k != "b"}, "holds the parameter b, which the model lacks"),
        (lambda shapes: shapes | {"b": (3, 2)}, r"b is \[2, 3\] in the checkpoint .*, but \[3, 2\] in the model"),
    ],
    ids=["extra", "missing", "shape"],
)
def test_another_model_is_refused_by_name(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shapes = {"a": (4,), "b": (2, 3)}
    folder = write(tmp_path / "checkpoint", [whole_state(1, shapes)])
    with pytest.raises(ConfigError, match=message):
        load_shards(folder, whole_state(2, change(shapes)))


def test_moments_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", [whole_state(1, {"a": (4,)}, ("master",))])
    with pytest.raises(ConfigError, match=r"lacks exp_avg of a"):
        load_shards(folder, whole_state(1, {"a": (4,)}, ("master", "exp_avg")))


def test_gaps_and_overlaps_are_not_written() -> None:
    shards = whole_state(1, {"a": (10,)})
    image = PartImage(shards)
    with pytest.raises(ValueError, match="leave gaps or overlap"):
        build_index([], [image.pieces, image.pieces], {"a": (10,)})
    with pytest.raises(ValueError, match="leave gaps or overlap"):
        build_index([], [PartImage(shards, (0, 2)).pieces], {"a": (10,)})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), truncate=st.booleans())
def test_damage_anywhere_is_found(
    data: st.DataObject, truncate: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write(tmp_path_factory.mktemp("c") / "step_00000001", [whole_state(1, {"a": (50,)}, ("master", "ema"))])
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 2))
    if truncate:
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    damage = find_damage(folder)
    assert damage is not None
    assert str(path) in damage or str(folder) in damage


def test_loading_damaged_bytes_is_an_error_and_others_load(tmp_path: Path) -> None:
    state = whole_state(1, {"first": (2**21,), "second": (2**21,)}, ("master",))
    folder = write(tmp_path / "checkpoint", [state])
    path = folder / "part_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    empty = Shard("second", (2**21,), 0, 0, {"master": torch.empty(0)})
    load_shards(folder, [*blank(state[:1]), empty])
    with pytest.raises(ConfigError, match=r"part_00000\.safetensors is damaged between bytes"):
        load_shards(folder, blank(state))


def test_meta_is_returned_as_it_was_given(tmp_path: Path) -> None:
    meta = {"step": 3, "lr": 0.1 + 0.2, "config": {"betas": [0.9, 0.95], "name": "größe", "none": None}}
    checkpointer = Checkpointer(tmp_path, keep=1, rank=0, world_size=1)
    checkpointer.save(3, whole_state(1, {"a": (4,)}), replicated=True, meta=meta)
    checkpointer.close()
    path = find_checkpoint(tmp_path, "auto")
    assert path is not None
    read = read_meta(path)
    assert {key: read[key] for key in meta} == meta
    assert read["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads((path / "meta.json").read_text())["values"] == read
    with pytest.raises(ConfigError, match="no usable checkpoint"):
        read_meta(tmp_path)


def test_index_is_read_back(tmp_path: Path) -> None:
    image = PartImage(whole_state(1, {"a": (4,), "s": ()}))
    image.copy_from(whole_state(1, {"a": (4,), "s": ()}))
    index = build_index([image.write(tmp_path / "part_00000.safetensors")], [image.pieces], {"a": (4,), "s": ()})
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index


def save_cut(rank: int, world_size: int, run: str, state_seed: int, cut_seed: int) -> None:
    checkpointer = Checkpointer(Path(run), keep=2, rank=rank, world_size=world_size)
    shards = cut(whole_state(state_seed), rank, world_size, cut_seed)
    checkpointer.save(1, shards, replicated=False, meta={"world_size": world_size})
    for shard in shards:  # the save has its own copy
        for tensor in shard.tensors.values():
            tensor.zero_()
    checkpointer.wait()
    checkpointer.close()


def load_and_compare(rank: int, world_size: int, run: str, state_seed: int, cut_seed: int) -> None:
    path = find_checkpoint(Path(run), "auto")
    assert path is not None
    expected = cut(whole_state(state_seed), rank, world_size, cut_seed)
    read = blank(expected)
    load_shards(path, read)
    assert equal(read, expected)


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_real_ranks_read_what_other_real_ranks_wrote(writers: int, tmp_path: Path) -> None:
    assert run_ranks(writers, save_cut, str(tmp_path), 3, 10 + writers) == [0] * writers
    for readers in (1, 2, 4):
        assert run_ranks(readers, load_and_compare, str(tmp_path), 3, 20 + readers) == [0] * readers


def load_other_model(rank: int, _: int, run: str) -> None:
    shapes = {"a": (9,), "b": (5,)} if rank == 0 else {"a": (9,), "c": (5,)}  # only one rank can see the difference
    with pytest.raises(ConfigError, match="lacks the parameter c"):
        load_shards(Path(run), whole_state(1, shapes))


def test_a_difference_that_one_rank_sees_stops_all(tmp_path: Path) -> None:
    write(tmp_path, [whole_state(1, {"a": (9,), "b": (5,)})])
    assert run_ranks(2, load_other_model, str(tmp_path)) == [0, 0]
