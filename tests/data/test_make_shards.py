"""Making shards from every kind of input: the same bytes each time, complete or invisible, and checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.shard_maker import make_shards
from nepa_scale.data.shard_set import RawSample, ShardSet
from nepa_scale.data.verify import verify

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "make_shards.py"
SYNSETS = ["n01440764", "n01443537", "n02084071", "n03000684"]


def picture(seed: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """4 classes of 6 images, made so that the file system's order is not the sorted one."""
    root = tmp_path / "tree"
    for label, synset in reversed(list(enumerate(SYNSETS))):
        (root / synset).mkdir(parents=True)
        for n in reversed(range(6)):
            (root / synset / f"{synset}_{n}.JPEG").write_bytes(picture(10 * label + n))
    return root


def read_set(folder: Path) -> dict[str, RawSample]:
    shards = ShardSet.open(str(folder), DataConfig())
    samples = [shards.read(number) for number in range(len(shards))]
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample for sample in samples}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_a_class_folder_tree(tree: Path, tmp_path: Path) -> None:
    description = make_shards(tree, tmp_path / "out", samples_per_shard=10, workers=1)
    samples = read_set(tmp_path / "out")
    assert len(samples) == 24
    for label, synset in enumerate(SYNSETS):
        for n in range(6):
            sample = samples[f"{synset}/{synset}_{n}"]
            assert sample.label == label
            assert sample.image == (tree / synset / f"{synset}_{n}.JPEG").read_bytes()
    assert [shard.samples for shard in description.shards] == [10, 10, 4]
    assert (description.classes, description.class_names) == (4, SYNSETS)
    names = [f"shard-{n:06d}.tar" for n in range(3)]
    assert sorted(digests(tmp_path / "out")) == sorted(["dataset.json", *names, *(f"{name}.idx" for name in names)])
    assert len({sample.label for sample in list(samples.values())[:10]}) >= 3, "classes are shuffled"
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert facts["samples"] == 24
    assert facts["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in names)
    for shard in facts["shards"]:
        assert shard["sha256"] == digests(tmp_path / "out")[shard["name"]]


def test_the_bytes_depend_on_input_and_settings_alone(tree: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples_per_shard": 7, "resize": 16, "quality": 80}
    make_shards(tree, tmp_path / "one", workers=1, **settings)
    time.sleep(0.01)
    make_shards(tree, tmp_path / "two", workers=2, **settings)
    make_shards(tree, tmp_path / "seed", workers=1, seed=1, **settings)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    one, other = read_set(tmp_path / "one"), read_set(tmp_path / "seed")
    assert one.keys() == other.keys()
    assert list(one) != list(other)


def test_stock_webdataset_reads_the_shards(tree: Path, tmp_path: Path) -> None:
    (tree / SYNSETS[0] / "a.b.c.png").write_bytes(picture(99, kind="PNG"))
    (tree / SYNSETS[1] / f"{'long' * 40}.jpg").write_bytes(picture(98))
    make_shards(tree, tmp_path / "out", samples_per_shard=10, workers=1)
    pattern = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    dataset = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;png", "cls")
    ours = read_set(tmp_path / "out")
    theirs = [(key.replace("./", ""), image.size, label) for key, image, label in dataset]
    assert theirs == [(sample.key, Image.open(io.BytesIO(sample.image)).size, sample.label) for sample in ours.values()]
    assert f"{SYNSETS[0]}/a_b_c" in ours


def test_keys_that_would_collide_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    for number, name in enumerate(("x.jpg", "x.png", "x.y.jpg", "x_y.jpg")):
        (tmp_path / "in" / "c" / name).write_bytes(picture(number))
    make_shards(tmp_path / "in", tmp_path / "out", workers=1)
    assert sorted(read_set(tmp_path / "out")) == ["c/x", "c/x-2", "c/x_y", "c/x_y-2"]


def test_images_without_classes_get_no_labels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(picture(n))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    description = make_shards(tmp_path / "in", tmp_path / "out", workers=1)
    assert description.classes is None
    assert {(s.key, s.label) for s in read_set(tmp_path / "out").values()} == {("0", None), ("1", None), ("2", None)}
    assert verify(tmp_path / "out", workers=1).problems == []


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("classes.txt", "".join(f"{synset} some words\n" for synset in SYNSETS), (0, 2)),
        ("marked.txt", "\ufeff" + "\n".join(SYNSETS), (0, 2)),  # as some editors save it
        ("dataset.json", json.dumps({"class_names": SYNSETS}), (0, 2)),
        ("class_to_idx.json", json.dumps({SYNSETS[0]: 2, SYNSETS[2]: 0, "other": 1}), (2, 0)),
    ],
)
def test_a_class_list_keeps_the_labels_of_another_set(
    tree: Path, tmp_path: Path, name: str, content: str, labels: tuple[int, int]
) -> None:
    for synset in (SYNSETS[1], SYNSETS[3]):
        shutil.rmtree(tree / synset)
    (tmp_path / name).write_text(content)
    make_shards(tree, tmp_path / "out", workers=1, class_list=tmp_path / name)
    found = {key.partition("/")[0]: sample.label for key, sample in read_set(tmp_path / "out").items()}
    assert found == {SYNSETS[0]: labels[0], SYNSETS[2]: labels[1]}
    (tmp_path / name).write_text("{}" if name.endswith("json") else "")
    with pytest.raises(ConfigError, match=SYNSETS[0]):
        make_shards(tree, tmp_path / "other", workers=1, class_list=tmp_path / name)


def test_resizing(tmp_path: Path) -> None:
    sources = {
        "large": picture(0, (200, 300)),
        "small": picture(1, (20, 30)),
        "grey": picture(2, (100, 150), mode="L"),
        "cmyk": picture(3, (100, 150), mode="CMYK"),
        "png": picture(4, (100, 150), "PNG", "RGBA"),
    }
    (tmp_path / "in" / "c").mkdir(parents=True)
    for name, content in sources.items():
        (tmp_path / "in" / "c" / f"{name}.JPEG").write_bytes(content)
    (tmp_path / "in" / "c" / "broken.JPEG").write_bytes(sources["large"][:3000])
    (tmp_path / "in" / "c" / "empty.JPEG").touch()
    description = make_shards(tmp_path / "in", tmp_path / "out", workers=1, resize=50, quality=95)
    samples = read_set(tmp_path / "out")
    assert samples["c/small"].image == sources["small"]
    for name in ("large", "grey", "cmyk", "png"):
        image = Image.open(io.BytesIO(samples[f"c/{name}"].image))
        assert (image.size, image.mode, image.format) == ((75, 50), "RGB", "JPEG")
        before = np.asarray(Image.open(io.BytesIO(sources[name])).convert("RGB"), dtype=np.float64).mean()
        assert abs(np.asarray(image, dtype=np.float64).mean() - before) < 3
    assert sorted(key for key, _ in description.left_out) == ["c/broken", "c/empty"]
    assert not {"c/broken", "c/empty"} & samples.keys()
    assert verify(tmp_path / "out", workers=1).problems == []


def test_original_bytes_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    for kind in ("PNG", "WEBP", "PPM", "JPEG"):
        (tmp_path / "in" / "c" / f"{kind}.JPEG").write_bytes(picture(0, kind=kind))
    make_shards(tmp_path / "in", tmp_path / "out", workers=1)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        names = {name for name in tar.getnames() if not name.endswith(".cls")}
    assert names == {"c/PNG.png", "c/WEBP.webp", "c/PPM.ppm", "c/JPEG.jpg"}


# The official ImageNet files


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_the_imagenet_training_tar(tree: Path, tmp_path: Path) -> None:
    nested = {}
    for synset in reversed(SYNSETS):
        files = {path.name: path.read_bytes() for path in (tree / synset).iterdir()}
        nested[f"{synset}.tar"] = tar_of(tmp_path / "nested.tar", files).read_bytes()
    train = tar_of(tmp_path / "ILSVRC2012_img_train.tar", nested)
    from_tar = make_shards(train, tmp_path / "from_tar", samples_per_shard=10, workers=1)
    make_shards(tree, tmp_path / "from_tree", samples_per_shard=10, workers=1)
    assert from_tar.class_names == SYNSETS
    by_key = {key: (s.image, s.label) for key, s in read_set(tmp_path / "from_tar").items()}
    assert by_key == {key: (s.image, s.label) for key, s in read_set(tmp_path / "from_tree").items()}
    train.write_bytes(train.read_bytes()[:-40_000])
    with pytest.raises(ConfigError, match="damaged"):
        make_shards(train, tmp_path / "cut", workers=1)


def devkit_files() -> dict[str, bytes]:
    """A devkit whose IDs are not in the order of the synsets, as the real one's are not, and that has an inner node."""
    scipy_io = pytest.importorskip("scipy.io", reason="the devkit's class list is a MATLAB file")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(n + 1, SYNSETS[(n + 2) % 4], "words", 0) for n in range(4)] + [(5, "n00001740", "entity", 2)]
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": np.array(rows, dtype=kind)})
    truth = "".join(f"{n % 4 + 1}\n" for n in range(8))
    folder = "ILSVRC2012_devkit_t12/data"
    return {
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        f"{folder}/meta.mat": buffer.getvalue(),
    }


@pytest.mark.parametrize("form", ["tar.gz beside", "folder beside", "named"])
def test_the_imagenet_validation_tar(tmp_path: Path, form: str) -> None:
    images = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": picture(n) for n in reversed(range(8))}
    val = tar_of(tmp_path / "ILSVRC2012_img_val.tar", images)
    with pytest.raises(ConfigError, match=r"ILSVRC2012_devkit_t12\.tar\.gz"):
        make_shards(val, tmp_path / "out", workers=1)
    named = None
    if form == "folder beside":
        for name, content in devkit_files().items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    else:
        name = "devkit.tgz" if form == "named" else "ILSVRC2012_devkit_t12.tar.gz"
        archive = tar_of(tmp_path / name, devkit_files(), "w:gz")
        named = archive if form == "named" else None
    description = make_shards(val, tmp_path / "out", workers=1, devkit=named)
    assert description.class_names == SYNSETS
    samples = read_set(tmp_path / "out")
    for n in range(8):  # image n has ID n % 4 + 1, which is synset (n + 2) % 4
        sample = samples[f"ILSVRC2012_val_{n + 1:08d}"]
        assert (sample.label, sample.image) == ((n + 2) % 4, images[f"{sample.key}.JPEG"])


def test_what_is_no_devkit_is_refused(tmp_path: Path) -> None:
    val = tar_of(tmp_path / "val.tar", {"ILSVRC2012_val_00000001.JPEG": picture(0)})
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="junk is not the ImageNet devkit"):
        make_shards(val, tmp_path / "out", workers=1, devkit=tmp_path / "junk")


# Hugging Face's parquet


def write_parquet(path: Path, images: list[Any], labels: list[int] | None, names: Any = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"image": images} | ({"label": labels} if labels is not None else {})
    table = pyarrow.table(columns)
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize("names", [["tench", "shark"], {"1": "shark", "0": "tench"}, None])
def test_parquet_exports(tmp_path: Path, names: Any) -> None:
    for part in range(2):
        images = [{"bytes": picture(10 * part + n), "path": f"n0_{part}{n}.JPEG"} for n in range(5)]
        write_parquet(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", images, [0, 1, 0, 1, -1], names)
    write_parquet(tmp_path / "data" / "test-00000.parquet", [{"bytes": picture(0), "path": None}], [-1])
    with pytest.raises(ConfigError, match="test and train"):
        make_shards(tmp_path / "data", tmp_path / "out", workers=1)
    description = make_shards(f"{tmp_path}/data/train-*.parquet", tmp_path / "out", samples_per_shard=4, workers=1)
    assert (description.classes, description.class_names) == (2, ["tench", "shark"] if names else None)
    samples = read_set(tmp_path / "out")
    assert len(samples) == 10
    for part in range(2):
        for n in range(5):
            sample = samples[f"n0_{part}{n}"]
            assert (sample.image, sample.label) == (picture(10 * part + n), [0, 1, 0, 1, None][n])
    assert not (tmp_path / "out" / ".making").exists()


def test_plain_columns_and_missing_images(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [picture(0), None, picture(2)], None)
    description = make_shards(source, tmp_path / "out", workers=1)
    assert {s.image for s in read_set(tmp_path / "out").values()} == {picture(0), picture(2)}
    assert description.left_out == [["00000_0000001", "the image is empty"]]


def test_parquet_needs_images_and_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "a.parquet", ["words"], [1])
    with pytest.raises(ConfigError, match="one column of image bytes"):
        make_shards(source, tmp_path / "out", workers=1)
    source.write_bytes(b"junk")
    with pytest.raises(ConfigError, match="not a parquet file"):
        make_shards(source, tmp_path / "out", workers=1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"nepa_scale\[parquet\]"):
        make_shards(source, tmp_path / "out", workers=1)


def test_shards_from_shards(tree: Path, tmp_path: Path) -> None:
    make_shards(tree, tmp_path / "first", samples_per_shard=10, workers=1)
    second = make_shards(tmp_path / "first", tmp_path / "second", samples_per_shard=5, workers=1, seed=3)
    assert second.class_names == SYNSETS
    before, after = read_set(tmp_path / "first"), read_set(tmp_path / "second")
    assert {k: (s.image, s.label) for k, s in before.items()} == {k: (s.image, s.label) for k, s in after.items()}
    broken = tmp_path / "first" / "shard-000001.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    third = make_shards(tmp_path / "first", tmp_path / "third", workers=1)
    assert third.left_out
    assert len(read_set(tmp_path / "third")) < 24


# Kills, and what is there already


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def descendants(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return [pid for child in map(int, listed.split()) for pid in (child, *descendants(child))]


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    noise = picture(0, (700, 700))
    for n in range(200):
        (tmp_path / "in" / "c" / f"{n}.jpg").write_bytes(noise + str(n).encode())
    settings = ["--samples-per-shard", "8", "--resize", "256"]
    out, draw = tmp_path / "killed", random.Random(os.getpid())
    for _ in range(3):
        expected = len(list(out.glob("*.tar"))) + 2
        command = [sys.executable, str(TOOL), str(tmp_path / "in"), str(out), *settings, "--workers", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            wait_for(lambda: len(list(out.glob("*.tar"))) >= expected or process.poll() is not None)  # noqa: B023
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(draw.uniform(0, 0.05))
            workers = descendants(process.pid)
            assert len(workers) >= 2
            process.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(map(running, workers)), 10)  # noqa: B023
        assert not (out / "dataset.json").exists()
    kept = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    whole = tmp_path / "whole"
    make_shards(tmp_path / "in", whole, samples_per_shard=8, resize=256, workers=1)
    made = digests(whole)
    assert 6 <= len(kept) < 25
    for name in kept:
        assert digests(out)[name] == made[name], "a visible shard is a whole one"
    assert run_tool(tmp_path / "in", out, *settings, "--workers", "2").returncode == 0
    assert digests(out) == made
    written_again = [name for name, inode in kept.items() if (out / name).stat().st_ino != inode]
    assert len(written_again) <= 2, "at most the shards whose record was not written yet"


def test_a_complete_set_is_left_alone_and_another_refused(tree: Path, tmp_path: Path) -> None:
    first = make_shards(tree, tmp_path / "out", workers=1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make_shards(tree, tmp_path / "out", workers=1) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match="other settings"):
        make_shards(tree, tmp_path / "out", workers=1, seed=1)
    (tree / SYNSETS[0] / "new.jpg").write_bytes(picture(1))
    with pytest.raises(ConfigError, match="other settings"):
        make_shards(tree, tmp_path / "out", workers=1)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_foreign_shards_are_never_overwritten(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="name another folder"):
        make_shards(tree, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == b"mine"


def test_a_lost_shard_of_a_complete_set_is_made_again(tree: Path, tmp_path: Path) -> None:
    make_shards(tree, tmp_path / "out", samples_per_shard=10, workers=1)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    make_shards(tree, tmp_path / "out", samples_per_shard=10, workers=1)
    assert digests(tmp_path / "out") == before


def test_inputs_that_are_not_understood(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "splits" / "train" / "c").mkdir(parents=True)
    (tmp_path / "splits" / "val").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "official").mkdir()
    tar_of(tmp_path / "official" / "ILSVRC2012_img_train.tar", {"n01440764.tar": b""})
    for source, why in (
        (tmp_path / "splits", "make shards of each"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "official", "name one of them"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_shards(source, tmp_path / "out", workers=1)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="lies in the input"):
        make_shards(tree, tree / "shards", workers=1)
    for wrong in ({"samples_per_shard": 0}, {"resize": 0}, {"quality": 101}):
        with pytest.raises(ConfigError):
            make_shards(tree, tmp_path / "out", workers=1, **wrong)  # type: ignore[arg-type]


# Verification


@pytest.fixture
def made(tree: Path, tmp_path: Path) -> Path:
    make_shards(tree, tmp_path / "made", samples_per_shard=10, workers=1)
    assert verify(tmp_path / "made", workers=1).problems == []
    return tmp_path / "made"


def whys(folder: Path) -> list[tuple[str, str]]:
    return [(problem.shard, problem.why) for problem in verify(folder, workers=1).problems]


def test_verify_names_a_changed_byte(made: Path) -> None:
    tar = made / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    assert (tar.name, "its bytes are not those that were written (checksum)") in whys(made)


def test_verify_names_missing_extra_and_short_shards(made: Path) -> None:
    (made / "shard-000000.tar").rename(made / "extra.tar")
    tar = made / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    found = whys(made)
    assert ("shard-000000.tar", "the shard is missing") in found
    assert ("extra.tar", "the shard is not in dataset.json") in found
    assert any(name == tar.name and "cut short" in why for name, why in found)
    assert any(name == tar.name and "samples, not 4" in why for name, why in found)


def test_verify_names_a_wrong_index(made: Path) -> None:
    index = made / "shard-000001.tar.idx"
    index.write_bytes((made / "shard-000000.tar.idx").read_bytes())
    assert whys(made) == [("shard-000001.tar", f"the index {index.name} does not fit the shard: remove it")]


def test_verify_names_bad_samples(tmp_path: Path) -> None:
    good, broken = picture(0), picture(0, (300, 300))[:-5000]
    tar_of(
        tmp_path / "a.tar",
        {
            "good.jpg": good,
            "good.cls": b"0",
            "broken.jpg": broken,
            "broken.cls": b"1",
            "bare.cls": b"1",
            "same.jpg": good,
        },
    )
    tar_of(tmp_path / "b.tar", {"same.jpg": good})
    problems = {(problem.shard, problem.key): problem.why for problem in verify(tmp_path, workers=1).problems}
    assert problems.keys() == {("a.tar", "broken"), ("a.tar", "bare"), ("a.tar", "same"), ("b.tar", "same")}
    assert "cannot be decoded" in problems["a.tar", "broken"]
    assert problems["a.tar", "bare"] == "no image"


def test_verify_checks_labels_against_the_description(made: Path) -> None:
    facts = json.loads((made / "dataset.json").read_text())
    facts["classes"] = 2
    (made / "dataset.json").write_text(json.dumps(facts))
    assert sum("is not below the 2 classes" in why for _, why in whys(made)) == 12


# The program


def test_the_program(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run_tool(tree, out, "--samples-per-shard", 10, "--workers", 1, "--seed", 2, "--verify", "--json", "-")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert (facts["samples"], facts["shards"], facts["classes"]) == (24, 3, 4)
    assert facts["verified"] == {"samples": 24, "problems": []}
    tar = out / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    checked = run_tool(out, "--verify", "--workers", 1, "--json", tmp_path / "facts.json")
    assert checked.returncode == 1
    assert "shard-000000.tar" in checked.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["verified"]["problems"]


@pytest.mark.parametrize("arguments", [["absent", "out"], ["absent", "--verify"]])
def test_the_program_says_what_is_wrong_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    failed = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "Traceback" not in failed.stderr


def test_real_images(tmp_path: Path) -> None:
    archive = REPOSITORY.parent / "shared" / "data" / "tiny_imagenet_50.tar.gz"
    if not archive.exists():
        pytest.skip("there is no Tiny-ImageNet sample beside the repository")
    with tarfile.open(archive) as tar:
        names = [member for member in tar.getmembers() if "/val/" in member.name]
        tar.extractall(tmp_path, members=names, filter="data")
    made = make_shards(tmp_path / "tiny_imagenet_50" / "val", tmp_path / "out", workers=1)
    assert (made.classes, sum(shard.samples for shard in made.shards)) == (50, 2500)
    assert verify(tmp_path / "out", workers=1).problems == []
