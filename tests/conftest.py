"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ORACLE = Path(__file__).parents[2] / "shared" / "oracles" / "nepa_tiny.pt"


@pytest.fixture(scope="session")
def oracle() -> dict[str, Any]:
    """Weights, inputs and results of the method's original code, where they lie beside the repository."""
    if not ORACLE.is_file():
        pytest.skip(f"no oracle: {ORACLE} is not there")
    return torch.load(ORACLE, weights_only=True)
