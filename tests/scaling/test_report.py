"""tools/report.py: from run folders of every kind to one page that needs nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from nepa_scale.command_line import run
from nepa_scale.scaling import fit_parametric
from nepa_scale.scaling.metrics import METRICS
from nepa_scale.scaling.points import Points
from nepa_scale.scaling.recorded_runs import read_recorded_runs
from nepa_scale.scaling.report import make_report, write_report
from nepa_scale.scaling.report_laws import MetricLaw
from nepa_scale.scaling.report_tables import law_table
from tests.launch import REPOSITORY, TINY, run_training, write_shards
from tests.scaling.headless import CHROMIUM, Browser
from tests.scaling.recorded_runs import BATCH, write_run, write_sweep
from tools.report import main

EVIL = '<script>alert(1)</script>&"'  # as a path: a folder in a folder
MB = 1e6


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = str(REPOSITORY / "tools" / "report.py")
    return subprocess.run([sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, timeout=180)


@dataclass(frozen=True)
class Written:
    page: Path
    html: str
    facts: dict[str, Any]

    def run(self, name: str) -> dict[str, Any]:
        return next(run for run in self.facts["runs"] if run["name"] == name)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page of a sweep, and of runs to which everything has happened."""
    folder = tmp_path_factory.mktemp("report")
    runs = write_sweep(folder / "sweep")
    write_run(folder / EVIL, 48, 3, 200)
    write_run(folder / 'other/script>&"', 48, 3, 150)  # of the same name, so that both are shown with their parents'
    torn = write_run(runs / "under_way", 64, 4, 300, until=90)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 95, "lo')
    write_run(runs / "collapsed", 48, 3, 100, knn=False, collapses=True)
    killed = write_run(runs / "killed", 32, 2, 100, until=40)
    (killed / "ranks").mkdir()
    said = "rank 1 failed in computing step 41: Traceback (most recent call last):\n  File\nValueError: <b>bad</b>"
    (killed / "ranks" / "failure.json").write_text(json.dumps({"rank": 1, "code": 1, "text": said}))
    (runs / "refused").mkdir()
    (runs / "refused" / "output.txt").write_text("loading\nerror: data.train=/nowhere holds no shards\n")
    page = folder / "out" / "page.html"
    arguments = [
        runs, folder / EVIL, folder / 'other/script>&"', "--output", page, "--json", folder / "facts.json",
        "--bootstrap", 20, "--title", "A & B",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # in this process, which has imported torch already
        patch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        assert main() == 0
    return Written(page, page.read_text(), json.loads((folder / "facts.json").read_text()))


class Reader(HTMLParser):
    """What a browser would take the page for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.inside, []).append(data)

    def said(self, *tags: str) -> str:
        return " ".join(" ".join(self.text.get(tag, [])) for tag in tags)


def test_every_run_is_shown_as_what_it_is(written: Written) -> None:
    status = {run["name"]: run["status"] for run in written.facts["runs"]}
    assert status.pop("under_way") == "unfinished"
    assert status.pop("killed") == status.pop("refused") == "failed"
    assert len(status) == 15
    assert set(status.values()) == {"finished"}
    assert written.run("under_way")["samples_seen"] == 90 * BATCH  # without the torn line
    assert written.run("under_way")["share"] == pytest.approx(0.3)
    assert written.run("killed")["said"] == "rank 1 failed in computing step 41: ValueError: <b>bad</b>"
    assert written.run("refused")["said"] == "error: data.train=/nowhere holds no shards"
    assert written.run("w32-3e+11")["weights"] == {"knn_error": "ema"}
    assert written.run("under_way")["weights"] == {"knn_error": "raw"}
    assert written.run("collapsed")["weights"] == {}
    assert written.run("collapsed")["collapsed"]
    assert written.run("w32-3e+11")["collapsed"] is None
    cells = Reader(written.html).said("th", "td")
    for expected in (*status, "unfinished, 30% of its steps", "finished, collapsed", "holds no shards", "<b>bad</b>"):
        assert expected in cells
    assert '<span class="interval">ema weights</span>' in written.html


def test_laws_are_fitted_to_the_sound_runs(written: Written) -> None:
    found = written.facts["laws"]["one_plus_loss"]
    assert len(found["runs"]) == 14
    assert not {"collapsed", "under_way", "killed"} & set(found["runs"])
    assert found["parametric"]["alpha"] == pytest.approx(0.28, rel=0.05)
    assert found["parametric"]["intervals"].keys() >= {"E", "A", "B", "alpha", "beta"}
    assert len(found["isoflop"]["budgets"]) >= 2
    for budget, (low, high) in zip(found["isoflop"]["budgets"], found["isoflop"]["intervals"]["optima"], strict=True):
        assert low <= budget["optimum"] * 1.01
        assert high >= budget["optimum"] * 0.99
    assert written.facts["laws"].keys() == {"one_plus_loss", "centred_loss", "knn_error"}
    best = [row["one_plus_loss"] for row in written.facts["frontier"]["one_plus_loss"]]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(
        min(run["final"].get("one_plus_loss", 9) for run in written.facts["runs"]), rel=0.02
    )  # which is the mean of a run's end


def test_no_string_of_a_run_becomes_markup(written: Written) -> None:
    reader = Reader(written.html)
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [
        {"type": "application/json", "id": "report"}, {}, {},
    ]  # fmt: skip
    assert not any(tag == "b" for tag, _ in reader.tags)
    assert EVIL in reader.said("th")
    data = json.loads(next(text for text in reader.text["script"] if text.startswith("{")))
    assert EVIL in {row["run"] for row in data["data"]["curves"]}


def test_the_page_is_whole_in_itself(written: Written) -> None:
    reader = Reader(written.html)
    assert not [attributes for _, attributes in reader.tags if "src" in attributes]
    links = [attributes["href"] for _, attributes in reader.tags if "href" in attributes]
    assert links
    assert all(link and link.startswith("#") for link in links)
    assert len(written.html) < 5 * MB
    assert ("html", {"lang": "en"}) in reader.tags
    assert reader.said("title").strip() == reader.said("h1").strip() == "A & B"
    drawn = [attributes for tag, attributes in reader.tags if tag == "figure"]
    assert [attributes["id"] for attributes in drawn] == written.facts["figures"]
    labelled = [attributes for _, attributes in reader.tags if attributes.get("role") == "img"]
    assert all(attributes["aria-label"] for attributes in labelled)
    assert len(labelled) == len(drawn)


def test_every_figure_lies_beside_the_page(written: Written) -> None:
    folder = written.page.with_name("page_figures")
    names = written.facts["figures"]
    for expected in ("curve_loss", "frontier_knn_error", "law_one_plus_loss", "isoflop_one_plus_loss",
                     "best_size_one_plus_loss", "cost_memory", "cost_images_per_second", "effective_rank"):  # fmt: skip
        assert expected in names
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
        drawing = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert drawing.tag.endswith("svg")
        assert len(list(drawing.iter())) > 50


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it(written: Written, tmp_path: Path) -> None:
    every = "[...document.querySelectorAll('figure')].every((figure) => figure.dataset.drawn)"
    # pixels of a chart that are not transparent
    painted = """[...document.querySelectorAll('.chart canvas')].map((canvas) => canvas.getContext('2d')
        .getImageData(0, 0, canvas.width, canvas.height).data
        .filter((value, at) => at % 4 === 3 && value > 0).length)"""
    again = "for (const figure of document.querySelectorAll('figure')) delete figure.dataset.drawn"
    with Browser(tmp_path / "profile") as browser:
        for width, scheme in ((360, "light"), (1600, "dark")):
            browser.open(written.page, width, scheme)
            browser.wait(every)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelector('.scroll').scrollWidth") > 360  # scrolls in itself instead
            pixels = browser.evaluate(painted)
            assert len(pixels) == len(written.facts["figures"])
            assert min(pixels) > 1000
            paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 30)"}[scheme]
            # a mark that no colour was given to is drawn in the ink of the theme
            marks = browser.evaluate("views.get(document.getElementById('curve_knn_error')).view.toSVG()")
            ink, other = {"light": ("#1f2328", "#e6e8eb"), "dark": ("#e6e8eb", "#1f2328")}[scheme]
            assert re.search(rf"<text[^>]*fill=.{ink}.[^>]*>raw pixels</text>", marks)
            assert other not in marks
            assert "black" not in marks
            assert browser.requests == [written.page.resolve().as_uri()]
        # the reader's choices
        browser.evaluate(again)
        browser.evaluate("""for (const box of document.querySelectorAll('figure input')) box.click()""")
        browser.evaluate("""for (const one of document.querySelectorAll('[name=over]')) {
            one.value = 'flops_seen'; one.dispatchEvent(new Event('change', { bubbles: true })) }""")
        browser.wait(every)
        scale = "views.get(document.getElementById('curve_one_plus_loss')).view.scale"
        assert browser.evaluate(f"{scale}('x').type") == "linear"
        assert browser.evaluate(f"{scale}('y').type") == "log"
        assert browser.evaluate(f"{scale}('x').domain()[1]") > 1e11
        # a value under the mouse
        browser.evaluate("document.getElementById('curve_one_plus_loss').scrollIntoView({ block: 'center' })")
        box = browser.evaluate("""(({ x, y, width, height }) => [x + width / 2, y + height / 3])(
            document.querySelector('#curve_one_plus_loss canvas').getBoundingClientRect())""")
        browser.move_mouse(*box)
        browser.wait("document.querySelector('.vg-tooltip.visible') !== null", seconds=10)
        assert "images seen" in browser.evaluate("document.querySelector('.vg-tooltip').textContent")
        assert browser.errors == []


def test_one_run_is_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "alone", 32, 2, 40, epochs=0.4, knn=False)
    made = make_report(read_recorded_runs([folder]), "Alone", lambda *_: None, bootstrap=0)
    facts = write_report(made, tmp_path / "alone.html", lambda *_: None)
    assert facts["runs"][0]["status"] == "finished"
    assert "of 2 more sizes" in facts["laws"]["one_plus_loss"]["parametric_refusal"]
    assert "not determined: 1 model sizes do not determine alpha" in (tmp_path / "alone.html").read_text()
    assert not [name for name in facts["figures"] if "knn" in name or "law" in name or "frontier" in name]


def test_a_run_without_a_row_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young", 32, 2, 40)
    (folder / "metrics.jsonl").write_text("")
    made = make_report(read_recorded_runs([tmp_path]), "Young", lambda *_: None)
    facts = write_report(made, tmp_path / "young.html", lambda *_: None)
    assert facts["runs"][0]["status"] == "unfinished"
    assert facts["figures"] == []


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "b/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("")
    names = [run.name for run in read_recorded_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "run"])]
    assert sorted(names) == ["a/run", "b/run", "other"]


def test_what_is_wrong_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    sound = write_run(tmp_path / "run", 32, 2, 4, knn=False)
    cases = [
        ([tmp_path / "empty"], "is not a run folder, and holds none"),
        ([tmp_path / "file"], "is not a folder"),
        ([sound, "--output", tmp_path / "file" / "page.html"], "choose another with --output"),
        ([sound, "--output", tmp_path / "empty"], "it is a folder"),
    ]
    for arguments, why in cases:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        assert run(main) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert why in said
        assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_real_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    shards, val = write_shards(tmp_path / "train"), write_shards(tmp_path / "val", samples=13, seed=9)
    folder = tmp_path / "run"
    arguments = [*TINY, f"data.train={shards}", f"data.val={val}", f"output={folder}", "evaluate.every=3"]
    done = run_training(arguments)
    assert done.returncode == 0, done.stderr
    done = report(folder, "--output", tmp_path / "page.html", "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    (found,) = facts["runs"]
    assert found["status"] == "finished"
    assert found["samples_seen"] == 48
    assert found["final"].keys() >= {"loss", "one_plus_loss", "centred_loss", "knn_error"}
    assert {"curve_knn_error", "effective_rank", "cost_memory"} <= set(facts["figures"])


def test_the_law_table_names_outliers_and_what_they_would_make_of_it() -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5), indexing="ij"))
    loss = (0.5 + 300 / n**0.35 + 900 / d**0.33) * np.exp(0.003 * np.random.default_rng(0).standard_normal(25))
    loss[[0, 21, 22]] *= [1.5, 1.2, 1.3]
    law = fit_parametric(n, d, loss, bootstrap=40)
    points = Points(n.tolist(), d.tolist(), loss.tolist(), None)
    table = law_table(
        [
            MetricLaw(
                next(one for one in METRICS if one.name == "one_plus_loss"), points, law=law, isoflop_refusal="none"
            )
        ]
    )
    assert law.with_outliers is not None
    said = f"without the outliers row 1, row 22, row 23; with them α {law.with_outliers.alpha:.4g}"
    assert any(said in cell.interval for cell in table.body[0])
