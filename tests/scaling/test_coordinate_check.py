"""tools/coordinate_check.py says what it found, draws it, and refuses what shows nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nepa_scale.command_line import run
from tools.coordinate_check import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """In this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", ["coordinate_check.py", *map(str, arguments)])
    return run(main)


def test_both_ways_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--sizes", 64, 32, "--steps", 2, "--seeds", 1)
    assert call(monkeypatch, *quick, "--plot", tmp_path / "c.png", "--json", tmp_path / "c.json") == 0
    assert "what all blocks add" in capsys.readouterr().out
    same, transferred = json.loads((tmp_path / "c.json").read_text())["checks"]
    assert same["sizes"] == transferred["sizes"] == [32, 64]
    assert (same["transferred"], transferred["transferred"]) == (False, True)
    assert same["scales"]["stream"][0] == transferred["scales"]["stream"][0]  # at the base they are the same
    assert same["scales"]["stream"][1] != transferred["scales"]["stream"][1]
    assert (tmp_path / "c.png").stat().st_size > 20_000


@pytest.mark.parametrize(("sizes", "why"), [((64,), "two or more"), ((64, 100), "multiples of 32")])
def test_refusals(
    sizes: tuple[int, ...], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--sizes", *sizes) == 2
    assert why in capsys.readouterr().err
