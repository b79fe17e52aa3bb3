"""The envelope of curves whose best sizes are known, and what does not determine it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nepa_scale.scaling.envelope import fit_envelope
from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.observations import NotDetermined
from nepa_scale.scaling.recorded_runs import RecordedRun

ALPHA, BETA = 0.4, 0.3
LOSS = Metric("loss", "loss", "loss")


def run(parameters: float, rows: list[dict[str, Any]]) -> RecordedRun:
    return RecordedRun(f"{parameters:.0f}", Path(), "", round(parameters), "finished", 1.0, "", None, rows, {}, 0, 0)


def curve(parameters: float, logged: int = 60) -> RecordedRun:
    """Compute is N D, so that N* ~ C^(beta / (alpha + beta))."""
    flops = np.geomspace(1e8, 1e14, logged)
    losses = 1 + 50 / parameters**ALPHA + 50 / (flops / parameters) ** BETA
    rows = [
        {"step": step, "flops_seen": c, "samples_seen": c / parameters, "loss": value}
        for step, (c, value) in enumerate(zip(flops.tolist(), losses.tolist(), strict=True), 1)
    ]
    return run(parameters, rows)


def test_the_best_size_grows_as_it_should() -> None:
    fit = fit_envelope([curve(n) for n in np.geomspace(1e2, 1e8, 40)], LOSS, bootstrap=50)
    assert fit.a == pytest.approx(BETA / (ALPHA + BETA), abs=0.02)
    assert fit.a + fit.b == pytest.approx(1, abs=1e-6)
    low, high = fit.intervals["a"]
    assert low < fit.a < high
    assert fit.sizes > 10


def test_what_does_not_determine_it_is_refused() -> None:
    with pytest.raises(NotDetermined, match="no run logs loss along its training"):
        fit_envelope([curve(n, logged=1) for n in (1e4, 1e5, 1e6)], LOSS)
    with pytest.raises(NotDetermined, match="only 2 sizes are ahead"):
        fit_envelope([curve(n) for n in (1e4, 1e6)], LOSS)
