"""The picture of a run: what it shows, and that no run is too odd for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from nepa_scale.training.curves import draw, plot_curves

KNN = {"step": 0, "knn_top1": 0.2, "knn_top1_untrained": 0.2, "knn_top1_pixels": 0.3}
ROWS: list[dict[str, Any]] = [
    KNN,
    *({"step": s, "loss": -s / 40, "grad_norm": 1.0, "lr": 0.1, "images_per_second": 9.0} for s in (10, 20)),
    {"step": 20, "knn_top1": 0.5},
]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


def write(run: Path, text: str) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text(text)
    return run


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_picture_of_a_run_that_was_killed_while_writing(tmp_path: Path) -> None:
    path = plot_curves(write(tmp_path / "run", lines(ROWS) + '{"step": 30, "lo'))
    assert path == tmp_path / "run" / "figures" / "curves.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10  # something is drawn


def test_panels_without_data_are_left_out() -> None:
    assert titles(draw(ROWS, "run")) == ["loss", "kNN top-1, %", "gradient norm", "learning rate", "images / s"]


def test_curve_holds_the_logged_values() -> None:
    (curve,) = draw(ROWS, "run").axes[0].get_lines()
    assert [list(data) for data in curve.get_data()] == [[10, 20], [-0.25, -0.5]]


def test_knn_beside_its_baselines() -> None:
    trained, untrained, pixels = draw(ROWS, "run").axes[1].get_lines()
    assert list(trained.get_ydata()) == [20, 50]
    assert set(untrained.get_ydata()) == {20}
    assert set(pixels.get_ydata()) == {30}
    assert [line.get_label() for line in (untrained, pixels)] == ["untrained network 20.0", "raw pixels 30.0"]


def test_points_of_raw_and_of_averaged_weights_are_told_apart() -> None:
    rows = [{"step": s, "knn_top1": s / 100, "weights": "raw" if s < 20 else "ema"} for s in (0, 10, 20, 30)]
    trained, raw = draw(rows, "run").axes[0].get_lines()
    assert [list(data) for data in raw.get_data()] == [[0, 10], [0, 10]]
    assert [line.get_label() for line in (trained, raw)] == ["trained (ema weights)", "raw weights"]
    (trained,) = draw(rows[:2], "run").axes[0].get_lines()
    assert trained.get_label() == "trained (raw weights)"
    assert draw(rows[:2], "run").axes[0].get_legend() is not None


def test_knn_without_baselines() -> None:
    (trained,) = draw([{"step": 5, "knn_top1": 0.5}], "run").axes[0].get_lines()
    assert list(trained.get_ydata()) == [50]


def test_single_point_is_visible() -> None:
    (curve,) = draw([{"step": 1, "loss": 0.5}], "run").axes[0].get_lines()
    assert curve.get_marker() == "o"


def test_values_that_cannot_be_drawn_are_gaps() -> None:
    rows = [{"step": 1, "loss": float("nan"), "lr": None}, {"step": 2, "loss": 0.5}, {"loss": 0.1}, {"step": 3}]
    figure = draw(rows, "run")
    assert titles(figure) == ["loss"]
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [2]


@pytest.mark.parametrize("text", ["", '{"st', lines([{"step": 0}])])
def test_run_that_logged_nothing(tmp_path: Path, text: str) -> None:
    assert plot_curves(write(tmp_path / "run", text)).stat().st_size > 0


def test_run_without_metrics(tmp_path: Path) -> None:
    assert plot_curves(tmp_path).exists()
