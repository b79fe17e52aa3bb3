"""tools/visualize.py end to end on a tiny model: pictures, gallery, numbers, and refusals in one clear line."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nepa_scale.analysis.attention import attention_rows, row_measures
from nepa_scale.analysis.drawing import heated, outlined
from nepa_scale.analysis.gallery import write_gallery
from nepa_scale.analysis.images import Framing, ImageSet, load_pixels
from nepa_scale.analysis.queries import sampled_patches
from nepa_scale.data.batch import normalize
from nepa_scale.interop import load_official, save_official
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier
from nepa_scale.objectives.next_embedding import next_embedding_loss
from tests.launch import REPOSITORY, TINY, run_training, write_shards

TOOL = REPOSITORY / "tools" / "visualize.py"
PATCH, SIDE = 8, 32
Program = Callable[..., tuple[int, str, str]]


def write_photographs(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Smooth images of these heights and widths, two of them in a folder of their own."""
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        place = folder / ("cats" if number < 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(place / f"n{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs") / "all", [(40, 60), (64, 48), (50, 50)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("official")
    save_official(build_vit("vit_b", PATCH, SIDE, seed=1, width=48, depth=3, heads=2, layer_scale=0.5), place)
    return place


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classifier")
    task = Classifier(build_vit("vit_b", PATCH, SIDE, seed=1, width=48, depth=3, heads=2), 4)
    for parameter in (p for name, p in task.named_parameters() if not name.startswith("backbone.")):
        torch.nn.init.zeros_(parameter)
    save_official(task, place)
    return place


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """Runs tools/visualize.py here, as it would by itself, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOL), run_name="__main__")
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def assert_gallery(folder: Path, pictures: list[str]) -> None:
    """The page shows these pictures, each of which is there, and needs nothing else."""
    page = (folder / "index.html").read_text()
    assert re.findall(r'<img src="([^"]+)"', page) == pictures
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(pictures)
    assert "://" not in page


def test_attention_of_a_folder(program: Program, pretrained: Path, photographs: Path, tmp_path: Path) -> None:
    status, out, err = program("attention", pretrained, f"all={photographs}", "--sampled", 5, "--json", "-")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["causal"] is True
    assert facts["output"] == "visualized/attention"
    assert [picture["image"] for picture in facts["pictures"]] == ["cats/n0", "cats/n1", "dogs/n2"]
    assert facts["pictures"][0]["queries"] == [[2, 2], [3, 3]]
    assert_gallery(tmp_path / "visualized" / "attention", [picture["file"] for picture in facts["pictures"]])
    with Image.open(tmp_path / "visualized" / "attention" / facts["pictures"][0]["file"]) as page:
        assert page.width > 900
        assert page.height > 2 * (330 + 3 * 190)  # two queries: the image, and three layers

    (found,) = facts["sets"]
    assert (found["name"], found["images"], found["queries"]) == ("all", 3, 15)
    assert [(layer["layer"], len(layer["cls_share"])) for layer in found["layers"]] == [(1, 2), (2, 2), (3, 2)]
    backbone = load_official(pretrained).task.backbone
    expected = []
    for number, item in enumerate(ImageSet.open(str(photographs)).items):
        images = normalize(load_pixels(item, Framing((SIDE, SIDE), PATCH))[None], torch.zeros(1, dtype=torch.bool))
        tokens = sampled_patches(5, 16, number) + 1
        rows = attention_rows(backbone, images, tokens, causal=True)[1][0, 1]
        expected.append(row_measures(rows, tokens, (4, 4))["distance_patches"])
    assert found["layers"][1]["distance_patches"][1] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


def test_whole_images_at_another_size_both_ways(program: Program, pretrained: Path, photographs: Path) -> None:
    arguments = (
        "attention",
        pretrained,
        photographs,
        "--whole",
        "--image-size",
        48,
        "--query",
        "0,0",
        "--query",
        "5,7",
    )
    backbone = load_official(pretrained).task.backbone
    items = ImageSet.open(str(photographs)).items
    for causal, word in ((True, "--causal"), (False, "--bidirectional")):
        status, out, err = program(*arguments, word, "--pictures", 1, "--limit", 2, "--json", "-")
        assert status == 0, err
        facts = json.loads(out)
        assert facts["pictures"][0]["grid"] == [6, 9]
        assert facts["pictures"][0]["queries"] == [[0, 0], [5, 7]]
        assert facts["sets"][0]["images"] == 2
        shares = []
        for number, item in enumerate([items[0], items[1]]):
            pixels = load_pixels(item, Framing((48, 48), PATCH, whole=True))[None]
            count = pixels.shape[2] * pixels.shape[3] // PATCH**2
            images, tokens = normalize(pixels, torch.zeros(1, dtype=torch.bool)), sampled_patches(16, count, number) + 1
            shares.append(attention_rows(backbone, images, tokens, causal=causal)[2][0, 0, :, 0])
        assert facts["sets"][0]["layers"][2]["cls_share"][0] == pytest.approx(float(torch.cat(shares).mean()), rel=1e-5)


def test_a_classifier_attends_as_it_was_trained(program: Program, classifier: Path, photographs: Path) -> None:
    image = photographs / "dogs" / "n2.jpg"
    status, out, err = program("attention", classifier, image)
    assert status == 0, err
    assert "bidirectional" in out
    # all 16 patches see all: the uniform entropy is that of 17 tokens
    assert re.search(r"uniform .*2\.83", out)
    assert (Path("visualized") / "attention" / "001_n2.png").is_file()


def test_similarity_of_two_sets(program: Program, pretrained: Path, photographs: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", samples=5, per_shard=3)
    output, file = tmp_path / "out", tmp_path / "facts.json"
    status, out, err = program(
        "similarity", pretrained, photographs, f"tars={shards}", "--query", "1,2",
        "--pictures", 2, "--output", output, "--json", file,
    )  # fmt: skip
    assert status == 0, err
    facts = json.loads(file.read_text())
    assert_gallery(output, [picture["file"] for picture in facts["pictures"]])
    assert [picture["image"] for picture in facts["pictures"]] == ["cats/n0", "cats/n1", "00000", "00002"]
    assert [(one["name"], one["images"], one["predictions"]) for one in facts["sets"]] == [
        (str(photographs), 3, 45),
        ("tars", 5, 75),
    ]
    task = load_official(pretrained).task
    first = ImageSet.open(str(photographs)).items[0]
    images = normalize(load_pixels(first, Framing((SIDE, SIDE), PATCH))[None], torch.zeros(1, dtype=torch.bool))
    with torch.no_grad():
        made = task(images)
    z, h = made["embeddings"][0, 1:], made["predictions"][0, 1:]
    shown = facts["pictures"][0]["queries"][0]
    assert shown["place"] == [1, 2]
    assert shown["model"]["cosine"] == pytest.approx(float(torch.cosine_similarity(h[6], z[7], dim=0)), abs=1e-5)
    assert shown["copy"]["cosine"] == pytest.approx(float(torch.cosine_similarity(z[6], z[7], dim=0)), abs=1e-5)
    lines = [line for line in out.splitlines() if line.startswith("tars  ")]
    assert len(lines) == 8
    score = facts["sets"][1]["unseen"]["copy"]
    assert f"{score['top1']:.1%}" in next(line for line in lines if "unseen" in line and "copy" in line)


def test_the_cosine_is_the_loss(program: Program, pretrained: Path, photographs: Path) -> None:
    """Over the predictions from patches, the mean cosine is the objective's, sign apart."""
    status, out, err = program("similarity", pretrained, photographs, "--pictures", 0, "--json", "-")
    assert status == 0, err
    task = load_official(pretrained).task
    losses = []
    for item in ImageSet.open(str(photographs)).items:
        images = normalize(load_pixels(item, Framing((SIDE, SIDE), PATCH))[None], torch.zeros(1, dtype=torch.bool))
        with torch.no_grad():
            made = task(images)
        losses.append(float(next_embedding_loss(made["embeddings"][:, 1:], made["predictions"][:, 1:])))
    found = json.loads(out)["sets"][0]["cosine"]["model"]
    assert found == pytest.approx(-sum(losses) / len(losses), abs=1e-5)


def test_an_image_of_the_models_size_is_not_touched_and_others_lose_no_more_than_they_must(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    square, wide = (random.integers(0, 256, (SIDE, width, 3), dtype=np.uint8) for width in (SIDE, SIDE + 12))
    framing = Framing((SIDE, SIDE), PATCH)
    for name, pixels in (("square", square), ("wide", wide)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    found = {item.key: load_pixels(item, framing).permute(1, 2, 0) for item in ImageSet.open(str(tmp_path)).items}
    assert np.array_equal(found["square"], square)
    assert np.array_equal(found["wide"], wide[:, 6:-6])
    (item,) = ImageSet.open(str(tmp_path / "wide.png")).items
    assert load_pixels(item, Framing((16, 16), PATCH, whole=True)).shape == (3, 16, 24)  # 22 is nearer to 24 than to 16


def test_a_map_is_laid_on_its_patches() -> None:
    image = np.full((8, 12, 3), 100, np.uint8)
    values = np.array([[0, 1, 0], [0, 0, 0]], np.float32)
    visible = np.array([[True, True, True], [False, False, False]])
    shown = heated(image, values, visible).astype(int)
    assert (shown[:4, 4:8].sum(-1) > 3 * 150).all()  # the hottest colour is light
    assert (shown[:4, :4].sum(-1) < 3 * 50).all()
    assert (shown[4:] > 200).all()  # faded
    marked = outlined(image, (2, 3), (1, 2), (255, 0, 0))
    changed = (marked != image).any(-1)
    assert changed[4:, 8:].sum() == 12
    assert changed.sum() == 12


def test_the_gallery_takes_any_name(tmp_path: Path) -> None:
    write_gallery(tmp_path, "a < b", "x & y", [('1"2.png', "<script>")])
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page
    assert "a &lt; b" in page
    assert 'src="1&quot;2.png"' in page


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--query", "4,0"], "4,0 is outside the 4 x 4 patches of cats/n0"),
        (["similarity", "PRETRAINED", "PHOTOGRAPHS", "--query", "3,3"], "--query 3,3 is the last patch of cats/n0"),
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--query", "4"], "4 must be ROW,COL: two whole numbers from 0"),
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--image-size", "30"], "not divide into patches of 8: try 32x32"),
        (["similarity", "PRETRAINED", "PHOTOGRAPHS", "--image-size", "8"], "cats/n0 is a single patch of 8 pixels"),
        (["similarity", "CLASSIFIER", "PHOTOGRAPHS"], "is a classifier, whose outputs predict no embeddings any more"),
        (["attention", "PRETRAINED", "HERE/empty"], "holds no images"),
        (["attention", "PRETRAINED", "HERE/nowhere"], "nowhere does not exist"),
        (["attention", "PRETRAINED", "HERE/notes.md"], "notes.md is no image"),
        (["attention", "PRETRAINED", "HERE/small.png"], "small.png has 40x7 pixels, less than a patch (8)"),
        (["similarity", "PRETRAINED", "HERE/broken.jpg"], "broken.jpg cannot be read"),
        (["similarity", "PRETRAINED", "HERE/cut.tar"], "HERE/cut.tar cannot be read in full"),
        (["attention", "HERE/empty", "PHOTOGRAPHS"], "holds no checkpoint"),
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--output", "HERE/notes.md"], "notes.md is a file: give"),
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--causal", "--bidirectional"], "not allowed with argument"),
        (["attention", "PRETRAINED", "PHOTOGRAPHS", "--pictures", "-1"], "-1 must be a whole number, at least 0"),
        (["look", "PRETRAINED", "PHOTOGRAPHS"], "invalid choice: 'look'"),
        ([], "required: attention | similarity"),
    ],
)  # fmt: skip
def test_refusals_are_one_clear_line(
    program: Program,
    pretrained: Path,
    classifier: Path,
    photographs: Path,
    tmp_path: Path,
    arguments: list[str],
    why: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("no image")
    Image.new("RGB", (40, 7)).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes((photographs / "cats" / "n0.jpg").read_bytes()[:200])
    whole = write_shards(tmp_path / "shards", samples=4) / "shard-000000.tar"
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2100])
    words = {"PRETRAINED": pretrained, "CLASSIFIER": classifier, "PHOTOGRAPHS": photographs}
    status, out, err = program(*(words.get(word, word.replace("HERE", str(tmp_path))) for word in arguments))
    assert status == 2
    assert not out
    assert why.replace("HERE", str(tmp_path)) in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_run_folders_of_several_objectives(program: Program, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    for name, keys in {"next": [], "same": ["objective.shift=false"], "mae": ["objective.name=mae"]}.items():
        done = run_training([*TINY, f"data.train={shards}", f"output={tmp_path / name}", *keys])
        assert done.returncode == 0, done.stderr[-2000:]
    status, out, err = program("similarity", tmp_path / "next", shards, "--limit", 8)
    assert status == 0, err
    assert "step 6 (raw weights), causal" in out
    for name, why in {"same": "predicts each patch's own embedding", "mae": "was trained by mae"}.items():
        status, _, err = program("similarity", tmp_path / name, shards)
        assert status == 2
        assert why in err
    status, out, err = program("attention", tmp_path / "mae", shards, "--limit", 8)
    assert status == 0, err
    assert "step 6 (raw weights), bidirectional" in out
