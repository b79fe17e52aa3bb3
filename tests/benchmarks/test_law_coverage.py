"""Of the laws that are printed, 90% intervals cover the truth in about 90% of trials."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from benchmarks.law_coverage import NOISES, coverage, table, trials


@pytest.mark.slow
def test_intervals_of_printed_laws_cover_what_they_say() -> None:
    done = list(islice(trials(seed=1), 240))
    printed = [trial for trial in done if trial.covered is not None]
    assert 0.4 < len(printed) / len(done) < 0.95
    shares = coverage(done)
    assert 0.85 <= np.mean(list(shares.values())) <= 0.95, shares
    assert all(0.82 <= share <= 0.97 for share in shares.values()), shares  # about 170 trials each
    for noise in NOISES:
        share = np.mean(list(coverage([trial for trial in done if trial.noise == noise]).values()))
        assert 0.83 <= share <= 0.97, (noise, share)
    small = [trial for trial in done if trial.side == 3 and trial.span == 4 and trial.sigma >= 0.02]
    assert small
    assert not [trial for trial in small if trial.covered is not None]
    assert f"| all | {len(done)} |" in table(done)
