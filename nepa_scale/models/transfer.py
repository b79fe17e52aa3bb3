"""Initialisation and learning rates of one size from those of another, so that one search for them serves all sizes.

Width: muP for Adam (2203.03466, table 8): the matrices between hidden layers start with a deviation, and learn at a
rate, that fall with the width. Their inputs of fixed size (patches), biases and norms are left as they are; there is no
readout, whose logits would have to be scaled. Heads must keep their width, or attention would change its scale. Depth:
CompleteP (2505.01618, table 1, alpha 1): a block adds to the stream in proportion to 1 / depth, by a factor of its own.
LayerScale is that factor; without it the last matrix of a branch takes it in. Adam's steps are as large as the rate, so
that what is multiplied by a factor must learn at a rate multiplied by it.

The weights named here are those of a backbone, or of a task around it (`backbone.<name>`).
"""

from __future__ import annotations

from nepa_scale.models.sizes import Architecture


def initial_factor(name: str, architecture: Architecture) -> float:
    """By what the initial values of a parameter are multiplied."""
    width, depth = _ratios(architecture)
    return (width**0.5 if _hidden_matrix(name) else 1.0) * (depth if _enters_stream(name, architecture) else 1.0)


def rate_factor(name: str, architecture: Architecture) -> float:
    """By what the learning rate of a parameter is multiplied."""
    width, depth = _ratios(architecture)
    return (width if _hidden_matrix(name) else 1.0) * (depth if _enters_stream(name, architecture) else 1.0)


def _ratios(architecture: Architecture) -> tuple[float, float]:
    """Of the base's width and depth to these; 1 where there is no base."""
    width = architecture.base_width or architecture.width
    depth = architecture.base_depth or architecture.depth
    return width / architecture.width, depth / architecture.depth


def _hidden_matrix(name: str) -> bool:
    owner, _, kind = name.rpartition(".")
    return name.removeprefix("backbone.").startswith("blocks.") and kind == "weight" and not owner.endswith("norm")


def _enters_stream(name: str, architecture: Architecture) -> bool:
    """Whether it is what a branch's output is multiplied by last, or the bias added to that."""
    *_, owner, kind = ("", *name.split("."))
    if architecture.layer_scale is None:
        return owner in ("out", "down")
    return kind in ("attention_scale", "mlp_scale")
