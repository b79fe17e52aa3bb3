"""Versions of packages, also where this one runs from a checkout that was never installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def package_version(package: str) -> str | None:
    """That of the installed package; of a plain checkout of this one, the one in its pyproject.toml; None: neither."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _checkout_version() if package == "nepa_scale" else None


def _checkout_version() -> str | None:
    try:
        return str(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return None
