"""tools/fit_scaling.py: from a file or from runs to a law, and clear refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from nepa_scale.command_line import run
from nepa_scale.config import Config, ModelConfig, TrainConfig, to_dict
from tests.launch import REPOSITORY
from tools import fit_scaling


def fit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in this process, as by itself: without the seconds of another process's imports."""
    words = ["fit_scaling.py", *map(str, arguments)]
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said), mock.patch.object(sys, "argv", words):
        try:
            status = run(fit_scaling.main)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), said.getvalue())


@pytest.fixture
def points(tmp_path: Path) -> Path:
    lines = ["params,tokens,final"]
    for n in np.geomspace(1e7, 1e9, 5):
        for d in np.geomspace(1e9, 1e11, 5):
            lines.append(f"{n},{d},{0.5 + 300 / n**0.35 + 900 / d**0.33}")
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "points.csv"


COLUMNS = ("--parameters", "params", "--samples", "tokens", "--loss", "final")


def test_a_file_becomes_a_law_and_a_picture(points: Path, tmp_path: Path) -> None:
    done = fit(points, *COLUMNS, "--json", "-", "--plot", tmp_path / "law.png", "--bootstrap", 20)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for kind in ("parametric", "variable_projection"):
        assert facts[kind]["alpha"] == pytest.approx(0.35, rel=5e-3)
        assert facts[kind]["B"] == pytest.approx(900, rel=5e-3)
    assert facts["parametric"]["intervals"].keys() >= {"E", "A", "B", "alpha", "beta"}
    assert facts["isoflop"] is None or facts["isoflop_reason"] is None
    assert facts["extrapolation_error"] < 1e-3
    assert facts["flops"] == "6 N D"  # said, since it is an assumption
    assert (tmp_path / "law.png").stat().st_size > 20_000
    program = [sys.executable, str(REPOSITORY / "tools" / "fit_scaling.py"), str(points), *COLUMNS, "--bootstrap", "0"]
    assert "N* ~ C^a" in subprocess.run(program, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture
def without_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take most of the tool's time."""
    monkeypatch.setattr(fit_scaling, "compare_forms", lambda *_: [])
    monkeypatch.setattr(fit_scaling, "compare_frontiers", lambda *_: [])


@pytest.mark.usefixtures("without_other_forms")
def test_what_is_not_determined_is_null_with_a_sentence(tmp_path: Path) -> None:
    lines = ["parameters,samples,loss"]
    lines += [f"{n},{d},{1.5 + 300 / n**0.32}" for n in (1e6, 3e6, 1e7, 3e7) for d in (1e7, 3e7, 1e8, 3e8)]
    (tmp_path / "flat.csv").write_text("\n".join(lines))
    done = fit(tmp_path / "flat.csv", "--json", "-", "--plot", tmp_path / "law.png", "--bootstrap", 20)
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    for kind in ("parametric", "variable_projection", "isoflop", "envelope"):
        assert facts[kind] is None
        assert facts[f"{kind}_reason"]
    assert "do not determine beta" in facts["parametric_reason"]
    assert "add runs of" in facts["parametric_reason"]
    assert not (tmp_path / "law.png").exists()
    assert "no law to draw" in done.stderr
    said = fit(tmp_path / "flat.csv").stdout
    assert f"no law: {facts['parametric_reason']}" in said
    assert "interval" not in said


@pytest.mark.usefixtures("without_other_forms")
def test_outliers_are_named_both_laws_shown_and_rows_left_out_on_request(tmp_path: Path) -> None:
    random, rows = np.random.default_rng(0), []
    for n in np.geomspace(1e7, 1e9, 5):
        for d in np.geomspace(1e9, 1e11, 5):
            rows.append([n, d, (0.5 + 300 / n**0.35 + 900 / d**0.33) * np.exp(0.003 * random.standard_normal())])
    clean = tmp_path / "clean.csv"
    write_rows(clean, rows)
    right = json.loads(fit(clean, "--json", "-", "--leave-out", "1,22-23", "--bootstrap", 40).stdout)
    for at, factor in ((0, 1.5), (21, 1.2), (22, 1.3)):
        rows[at][2] *= factor
    wrong = tmp_path / "wrong.csv"
    write_rows(wrong, rows)
    facts = json.loads(fit(wrong, "--json", "-", "--bootstrap", 40).stdout)
    law = facts["parametric"]
    assert law["outliers"] == [0, 21, 22]
    assert law["beta"] == pytest.approx(right["parametric"]["beta"], rel=1e-3)
    assert abs(law["with_outliers"]["beta"] / law["beta"] - 1) > 0.01
    said = fit(wrong, "--bootstrap", 40).stdout
    assert "with the outliers" in said
    assert "far above the law (trained badly?): row 1 (+" in said
    assert f"{law['with_outliers']['beta']:.5g}" in said
    left = json.loads(fit(wrong, "--json", "-", "--leave-out", "1,22-23", "--bootstrap", 40).stdout)
    assert left["parametric"] == right["parametric"]
    assert left["runs"] == 22
    assert list(left["left_out"]) == ["row 1", "row 22", "row 23"]
    assert "left out: row 22: left out by --leave-out" in fit(wrong, "--leave-out", "22", "--bootstrap", 0).stdout
    rows.append([*rows[12][:2], 2 * rows[12][2]])
    write_rows(wrong, rows)
    shifted = json.loads(fit(wrong, "--json", "-", "--leave-out", "1,22-23", "--bootstrap", 0).stdout)
    assert shifted["parametric"]["outliers"] == [25]
    assert [25, 12] in shifted["parametric"]["beaten"]
    for rows_named, why in (
        ("0", "must be rows from 1"),
        ("7-3", "such as 3,7-9"),
        ("99", "names row 99, and there are 26"),
    ):
        done = fit(wrong, "--leave-out", rows_named)
        assert done.returncode == 2
        assert why in done.stderr


def write_rows(path: Path, rows: list[list[float]]) -> None:
    path.write_text("\n".join(["parameters,samples,loss", *(",".join(map(str, row)) for row in rows)]))


def test_what_is_wrong_is_one_clear_line(points: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(points.read_text() + "1e8,many,0.7\n")
    cases = [
        ((points, "--parameters", "parms", *COLUMNS[2:]), "no column 'parms' (did you mean 'params'?)"),
        ((tmp_path / "bad.csv", *COLUMNS), "row 26 (line 27): tokens is 'many', not a number"),
        ((tmp_path, "--loss", "one_plus_loss"), "is not a run folder, and holds none"),
    ]
    for arguments, why in cases:
        done = fit(*arguments)
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--level", "90"), "90 must lie between 0 and 1: 0.9 for 90%"),
        (("--level", "nan"), "nan must lie between 0 and 1"),
        (("--bootstrap", "-5"), "-5 must be 0, for no intervals, or a whole number from 10"),
        (("--bootstrap", "1"), "1 must be 0, for no intervals, or a whole number from 10"),
        (("--samples-from-flops", "6ND"), "--samples-from-flops needs the column of compute"),
        (("--samples-from-flops", "6ND", "--flops", "c", "--samples", "d"), "--samples names the column of D"),
        (("--samples-from-flops", "8ND", "--flops", "c"), "8ND is not one of 6ND"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(options: tuple[str, ...], why: str) -> None:
    done = fit("points.csv", *options)
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_runs_are_read_from_their_folders(tmp_path: Path) -> None:
    import yaml

    folders = []
    for depth in (1, 2, 4):
        for samples in (100, 400, 1600):
            folder = tmp_path / f"run_{depth}_{samples}"
            folder.mkdir()
            config = Config(
                train=TrainConfig(steps=9),
                model=ModelConfig(width=48, heads=3, depth=depth, patch_size=8, image_size=32),
            )
            (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config) | {"provenance": {}}))
            n = 40_000 * depth
            rows = [{"step": 1, "samples_seen": 1, "flops_seen": 1.0, "one_plus_loss": 1.0},
                    {"step": 9, "samples_seen": samples, "flops_seen": 6.0 * n * samples,
                     "one_plus_loss": 0.1 + 5 / n**0.3 + 2 / samples**0.4,
                     "knn_top1": 0.9 - 5 / n**0.3 - 2 / samples**0.4, "weights": "ema" if samples > 100 else "raw"},
                    ]  # fmt: skip
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            folders.append(folder)
    for name, last in (("collapsed", {"step": 9, "target_cosine": 0.99}), ("unfinished", {"step": 5})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config) | {"provenance": {}}))
        row = {"samples_seen": 50, "flops_seen": 1e9, "one_plus_loss": 0.1} | last
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    done = fit(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "name what to fit with --loss: of 11 runs there are one_plus_loss (11), knn_error (9)" in done.stderr
    done = fit(tmp_path, "--loss", "one_plus_loss", "--bootstrap", 0, "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["runs"] == 9
    assert facts["forms"][0]["formula"] == "E + A/N^alpha + B/D^beta"
    assert list(facts["left_out"]) == ["collapsed", "unfinished"]
    assert "cosine of 0.990" in facts["left_out"]["collapsed"]
    assert facts["parametric"]["beta"] == pytest.approx(0.4, rel=0.01)
    assert facts["flops"] == "counted by the runs"
    assert facts["weights"] == {}  # the training loss is that of the weights that are trained
    done = fit(tmp_path, "--loss", "knn_error", "--bootstrap", 0)
    assert "warning: knn_error is of ema weights in run_1_400, run_1_1600, " in done.stdout
    assert "; of raw weights in run_1_100, run_2_100, run_4_100: these are not measured alike" in done.stdout
