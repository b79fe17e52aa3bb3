"""Reading shards: what a tar holds, whatever state it is in."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.shard_set import BadSample, RawSample, ShardSet
from nepa_scale.data.shard_writer import SourceSample, write_shard
from nepa_scale.data.tar_index import SUFFIX, index_shard

Files = Iterable[tuple[str, bytes]]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "cache"))


def write_tar(path: Path, files: Files, tar_format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key: str, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", f"image of {key}".encode()), (f"{key}.cls", str(label).encode())]


def read_all(shards: ShardSet) -> list[RawSample | BadSample]:
    found: list[RawSample | BadSample] = []
    for number in range(len(shards)):
        try:
            found.append(shards.read(number))
        except BadSample as bad:
            found.append(bad)
    return found


def whys(found: list[RawSample | BadSample]) -> list[tuple[str, str]]:
    return [(sample.key, sample.why) for sample in found if isinstance(sample, BadSample)]


def test_samples_come_in_shard_order_then_tar_order(tmp_path: Path, data: DataConfig) -> None:
    write_tar(tmp_path / "b.tar", [file for key in ("z", "y") for file in pair(key, 7)])
    write_tar(tmp_path / "a.tar", [file for key in ("x", "folder/w", "v") for file in pair(key, 2)])
    shards = ShardSet.open(str(tmp_path), data)
    samples = [shards.read(number) for number in range(len(shards))]
    assert [sample.key for sample in samples] == ["x", "folder/w", "v", "z", "y"]
    assert [sample.image for sample in samples] == [f"image of {sample.key}".encode() for sample in samples]
    assert [sample.label for sample in samples] == [2, 2, 2, 7, 7]
    assert shards.shard_sizes == [3, 2]
    assert shards.names == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert shards.classes == 8
    assert not shards.remote
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            shards.read(outside)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jpeg", "a.JPEG", "a.png", "a.WebP", "a.ppm"])
def test_image_extensions(tmp_path: Path, data: DataConfig, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"pixels"), ("a.txt", b"a caption"), ("a.seg.png", b"mask")])
    sample = ShardSet.open(str(path), data).read(0)
    assert sample == RawSample("a", b"pixels", None, str(path))


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ([("a.cls", b"12\n")], 12),
        ([("a.json", b'{"label": 3}')], 3),
        ([("a.json", b'{"cls": 4, "caption": "cat"}')], 4),
        ([("a.cls", b"5"), ("a.json", b'{"label": 6}')], 5),
        ([("a.json", b'{"label": 6}'), ("a.cls", b"5")], 5),
        ([("a.json", b'{"label": Infinity}')], None),
        ([("a.json", b"[" * 100_000)], None),
        ([("a.json", b'["label"]')], None),
        ([("a.cls", b"-1")], None),
        ([("a.cls", b"n01440764")], None),
        ([("a.cls", b"9" * 30)], None),
        ([("a.cls", b"")], None),
        ([], None),
    ],
)
def test_labels(tmp_path: Path, data: DataConfig, files: list[tuple[str, bytes]], label: int | None) -> None:
    path = write_tar(tmp_path / "a.tar", [*files, ("a.jpg", b"pixels")])
    shards = ShardSet.open(str(path), data)
    assert shards.read(0).label == label
    assert shards.classes == (None if label is None else label + 1)


def test_interleaved_samples_are_put_together(tmp_path: Path, data: DataConfig) -> None:
    first, second = pair("a", 1), pair("b", 2)
    path = write_tar(tmp_path / "a.tar", [first[0], second[0], second[1], first[1]])
    found = read_all(ShardSet.open(str(path), data))
    assert [(sample.key, getattr(sample, "label", None)) for sample in found] == [("a", 1), ("b", 2)]


def test_the_second_of_two_samples_with_one_key_is_bad(tmp_path: Path, data: DataConfig) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("a", 1), *pair("b", 2), *pair("a", 3)])
    found = read_all(ShardSet.open(str(path), data))
    assert isinstance(found[0], RawSample)
    assert found[0].label == 1
    assert whys(found) == [("a", "a second sample with the same key")]


def test_samples_without_an_image_are_bad(tmp_path: Path, data: DataConfig) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.cls", b"1"), *pair("b", 2), ("c.jpg", b"")])
    assert whys(read_all(ShardSet.open(str(path), data))) == [("a", "no image"), ("c", "the image is empty")]


@pytest.mark.parametrize("content", [b"", bytes(10240), bytes(100)])
def test_an_empty_shard_is_one_bad_sample(tmp_path: Path, data: DataConfig, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", pair("a", 0))
    (tmp_path / "b.tar").write_bytes(content)
    shards = ShardSet.open(str(tmp_path), data)
    assert whys(read_all(shards)) == [("", "the shard is empty")]


def test_a_missing_shard_counts_and_is_named(tmp_path: Path, data: DataConfig) -> None:
    write_tar(tmp_path / "s-0.tar", pair("a", 0))
    shards = ShardSet.open(str(tmp_path / "s-{0..1}.tar"), data)
    with pytest.raises(BadSample) as caught:
        shards.read(1)
    assert caught.value.shard == str(tmp_path / "s-1.tar")
    assert caught.value.why == "the shard is missing"


def test_a_shard_that_vanishes_during_the_run_is_missing(tmp_path: Path, data: DataConfig) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("a", 0), *pair("b", 0)])
    shards = ShardSet.open(str(path), data)
    path.unlink()
    assert [why for _, why in whys(read_all(shards))] == ["the shard cannot be read: No such file or directory"] * 2


@pytest.mark.parametrize("cut", [*range(1, 6 * 1024, 511), 512, 1536, 2048, 3072])
def test_a_truncated_shard_loses_only_what_was_cut(tmp_path: Path, data: DataConfig, cut: int) -> None:
    files = [file for key in "abc" for file in [(f"{key}.jpg", key.encode() * 700), (f"{key}.cls", b"1")]]
    path = write_tar(tmp_path / "a.tar", files)
    whole = [sample for sample in read_all(ShardSet.open(str(path), data)) if isinstance(sample, RawSample)]
    path.write_bytes(path.read_bytes()[:cut])
    found = read_all(ShardSet.open(str(path), data))
    readable = [sample for sample in found if isinstance(sample, RawSample)]
    assert [sample.image for sample in readable] == [sample.image for sample in whole[: len(readable)]]
    assert len(readable) >= cut // (512 + 2 * 1024 + 1024) - 1
    assert all("cut short" in why for _, why in whys(found))
    assert len(whys(found)) == 1


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, data: DataConfig, tar_format: int) -> None:
    keys = ["short", "d" * 90 + "/" + "k" * 60, "ключ"]
    path = write_tar(tmp_path / "a.tar", [file for key in keys for file in pair(key, 1)], tar_format)
    assert [sample.key for sample in read_all(ShardSet.open(str(path), data))] == keys


def test_links_folders_and_hidden_files_are_passed_over(tmp_path: Path, data: DataConfig) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "target"
            tar.addfile(info)
        for name in ("._a.jpg", "__meta__/x.jpg", "d/a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [sample.key for sample in read_all(ShardSet.open(str(path), data))] == ["d/a"]


def test_a_compressed_shard_is_named_as_such(tmp_path: Path, data: DataConfig) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    assert "compressed" in whys(read_all(ShardSet.open(str(tmp_path), data)))[0][1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 20 * 512), st.binary(min_size=1, max_size=40)), max_size=6))
def test_no_damage_stops_the_indexing(tmp_path: Path, damage: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "fuzzed.tar"
    write_tar(path, [file for key in ("a", "b", "n" * 120) for file in pair(key, 1)], tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for offset, change in damage:
        content[offset : offset + len(change)] = change
    path.write_bytes(content)
    index = index_shard(path)
    assert len(index) >= 1
    for number in range(len(index)):
        entry = index[number]
        assert entry.flaw is not None or entry.offset + entry.size <= len(content)


def test_a_changed_shard_is_indexed_again(tmp_path: Path, data: DataConfig) -> None:
    path = write_tar(tmp_path / "a.tar", pair("a", 1))
    assert ShardSet.open(str(path), data).read(0).key == "a"
    before = path.stat().st_size
    write_tar(path, pair("b", 2))
    assert path.stat().st_size == before
    assert ShardSet.open(str(path), data).read(0).key == "b"


@pytest.mark.parametrize("junk", [b"", b"NEPAIDX1", b"NEPAIDX1" + bytes(32), b"junk" * 100])
def test_a_damaged_index_is_made_again(tmp_path: Path, data: DataConfig, junk: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", pair("a", 1))
    ShardSet.open(str(path), data)
    index = Path(f"{path}{SUFFIX}")
    time_ns = index.stat().st_mtime_ns
    index.write_bytes(junk)
    os.utime(index, ns=(time_ns, time_ns))
    assert ShardSet.open(str(path), data).read(0).key == "a"


def test_the_index_of_a_read_only_folder_goes_to_the_cache(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "readonly" / "a.tar", pair("a", 1))
    real_replace = os.replace

    def refuse(source: str | Path, target: str | Path) -> None:
        if Path(target).parent == path.parent:
            raise PermissionError(13, "Permission denied")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert ShardSet.open(str(path), data).read(0).key == "a"
    assert [file.name for file in path.parent.iterdir()] == ["a.tar"]
    assert list(Path(str(data.cache)).rglob(f"*{SUFFIX}"))
    monkeypatch.setattr("nepa_scale.data.index_files.index_shard", lambda _: pytest.fail("indexed twice"))
    assert ShardSet.open(str(path), data).read(0).key == "a"


def _open_and_read(source: str, cache: str) -> list[str]:
    shards = ShardSet.open(source, DataConfig(cache=cache))
    return [shards.read(number).key for number in range(len(shards))]


def test_many_processes_may_index_at_once(tmp_path: Path, data: DataConfig) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [f for n in range(200) for f in pair(f"{shard}-{n}", n)])
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        results = pool.starmap(_open_and_read, [(str(tmp_path), str(data.cache))] * 3)
    assert results == [[f"{shard}-{n}" for shard in range(4) for n in range(200)]] * 3
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_read_through_a_copy(tmp_path: Path, data: DataConfig, method: str) -> None:
    write_tar(tmp_path / "a.tar", [f for n in range(20) for f in pair(str(n), n)])
    shards = ShardSet.open(str(tmp_path), data)
    shards.read(0)  # so that files are open when the process forks
    assert len(pickle.dumps(shards)) < 2000
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(shards.read, range(20)) == [shards.read(number) for number in range(20)]


def test_more_shards_than_open_files(tmp_path: Path, data: DataConfig) -> None:
    for shard in range(300):
        write_shard(tmp_path / f"{shard:03d}.tar", [SourceSample(f"{shard}", b"\xff\xd8\xff", shard)])
    shards = ShardSet.open(str(tmp_path), data)
    for number in random.Random(0).choices(range(300), k=2000):
        assert shards.read(number).label == number
    assert len(os.listdir("/proc/self/fd")) < 250


def test_bad_samples_survive_the_way_between_processes() -> None:
    bad = pickle.loads(pickle.dumps(BadSample("s.tar", "k", "broken")))
    assert (bad.shard, bad.key, bad.why) == ("s.tar", "k", "broken")
    assert str(bad) == "k in s.tar: broken"


def test_sources(tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, key in (("one", "a"), ("two", "b"), ("two", "c")):
        write_tar(tmp_path / folder / f"{key}.tar", pair(key, 0))
    listed = tmp_path / "list.txt"
    listed.write_text(f"# a comment\n{tmp_path}/one/a.tar\n\n{tmp_path}/two\n")

    def keys(source: str) -> list[str]:
        shards = ShardSet.open(source, data)
        return [shards.read(number).key for number in range(len(shards))]

    assert keys(f"{tmp_path}/two") == ["b", "c"]
    assert keys(f"{tmp_path}/two/{{c,b}}.tar") == ["c", "b"]
    assert keys(f"{tmp_path}/*/[ab].tar") == ["a", "b"]
    assert keys(f"{tmp_path}/two::{tmp_path}/one") == ["b", "c", "a"]
    assert keys(str(listed)) == ["a", "b", "c"]
    listed.write_text(f"\ufeff{tmp_path}/one/a.tar\n")
    assert keys(str(listed)) == ["a"]
    listed.write_bytes(b"\xff\xfe/\0")
    with pytest.raises(ConfigError, match="cannot read the list of shards"):
        keys(str(listed))
    assert keys(f"file://{tmp_path}/one/a.tar") == ["a"]
    monkeypatch.chdir(tmp_path)
    assert keys("one/a.tar") == ["a"]


@pytest.mark.parametrize("source", ["nowhere", "no/where-{000..003}.tar", "", "*.tar"])
def test_a_source_without_shards_is_one_clear_line(
    tmp_path: Path, data: DataConfig, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        ShardSet.open(source, data)
    assert f"'{source}'" in str(caught.value)
    assert "tools/make_shards.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_demo_is_made_by_make(tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="make demo"):
        ShardSet.open("data/demo/train", data)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"shards": [{"name": "../x.tar"}]}', b"\xff"])
def test_a_damaged_description_is_named(tmp_path: Path, data: DataConfig, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", pair("a", 0))
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dataset\.json"):
        ShardSet.open(str(tmp_path), data)


def test_a_description_rules_over_the_folder(tmp_path: Path, data: DataConfig) -> None:
    shards = [
        {"name": f"{name}.tar", "samples": count, "bytes": 1, "sha256": ""} for name, count in (("b", 1), ("a", 3))
    ]
    (tmp_path / "dataset.json").write_text(
        json.dumps({"shards": shards, "classes": 9, "class_names": list("abcdefghi")})
    )
    write_tar(tmp_path / "b.tar", pair("b", 0))
    write_tar(tmp_path / "unlisted.tar", pair("c", 0))
    found = ShardSet.open(str(tmp_path), data)
    assert [Path(name).name for name in found.names] == ["b.tar", "a.tar"]
    assert found.shard_sizes == [1, 3], "the missing shard counts as it is described"
    assert (found.classes, found.class_names) == (9, list("abcdefghi"))
    assert ShardSet.open(str(tmp_path / "{b,a}.tar"), data).classes == 9


def test_opening_and_reading_anywhere_in_an_imagenet_is_fast(tmp_path: Path, data: DataConfig) -> None:
    """1.28M samples: 1282 sparse shards with indices as real ones have, none of which is read whole."""
    template = write_tar(
        tmp_path / "template", [f for n in range(1000) for f in pair(f"n01440764/n01440764_{n:05d}", n)]
    )
    index = index_shard(template)
    names = [tmp_path / "set" / f"shard-{number:06d}.tar" for number in range(1282)]
    names[0].parent.mkdir()
    for name in names:
        os.link(template, name)
        index.save(Path(f"{name}{SUFFIX}"), template.stat().st_mtime_ns)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        shards = ShardSet.open(str(tmp_path / "set"), data)
        shards = pickle.loads(pickle.dumps(shards))
        sample = shards.read(640_123)
        times.append(time.perf_counter() - start)
    assert len(shards) == 1_282_000
    assert (sample.key, shards.classes) == ("n01440764/n01440764_00123", 1000)
    assert min(times) < 1.0, times
    assert np.sum(shards.shard_sizes) == len(shards)
