"""Progress where no terminal is: lines with count, rate and time left, and the items as they were."""

from __future__ import annotations

import re

import pytest

from nepa_scale.training import progress


def test_items_pass_through_and_lines_come_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 2.0, 40.0, 42.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.with_progress("abc", "reading", 3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"reading 2/3, 0\.05/s, 20s left\n", err)  # 30 seconds after the last line, and not before
