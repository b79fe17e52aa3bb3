"""Weights that travel: the layouts of other libraries, both ways."""

from nepa_scale.interop.official import OfficialModel, load_official, save_official

__all__ = ["OfficialModel", "load_official", "save_official"]
