"""A set to evaluate on, held against the one trained on: other images, and labels that mean the same classes."""

from __future__ import annotations

from collections.abc import Sequence

from nepa_scale.config import ConfigError
from nepa_scale.data import ShardSet

MOST = 0.5  # of the images: above it the set is not another


def describe_same(same: int, total: int, held_out: str, training: str) -> str:
    """A line on images of the one set that are in the other as well; empty where there are none."""
    if not same:
        return ""
    count = "all" if same == total else f"about {same:,}"
    return f"{count} of the {total:,} images of {held_out} are images of {training}"


def require_other_images(same: int, total: int, held_out: str, training: str) -> str:
    """The line of `describe_same` where they are few.

    Raises:
        ConfigError: they are most: the result would tell what was memorised.
    """
    line = describe_same(same, total, held_out, training)
    if same > MOST * total:
        raise ConfigError(f"{line}: results on them are no test; give images that were not trained on")
    return line


def match_classes(
    held_out: ShardSet, name: str, names: Sequence[str] | None, classes: int, training: str
) -> tuple[ShardSet, str]:
    """`held_out` with the labels that its classes have by name in `names`; by number where either has no names.

    name, training: the set and what was trained, for messages
    names, classes: of training
    Returns the set, and a line where they are matched by number and their counts differ, else "".
    Raises:
        ConfigError: a class that training does not know.
    """
    if held_out.class_names is not None and names is not None:
        return held_out.with_classes(list(names), name), ""
    if held_out.classes == classes:
        return held_out, ""
    nameless = [one for one, known in ((name, held_out.class_names), (training, names)) if known is None]
    return held_out, (
        f"{name} has {held_out.classes} classes and {training} {classes}; they are matched by number, "
        f"as {' and '.join(nameless)} {'does' if len(nameless) == 1 else 'do'} not name them"
    )
