"""Classes are the same where their names are: labels of one list of names as labels of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nepa_scale.config import ConfigError

_SHOWN = 5


def numbers_of(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """The place in `known` of each of `names`.

    where: what has these names, for messages
    Raises:
        ConfigError: a name is not known, or it is that of several classes and the two lists differ.
    """
    if list(names) == list(known):
        return list(range(len(names)))
    places = {name: place for place, name in enumerate(known)}
    if unknown := [name for name in names if name not in places]:
        raise ConfigError(f"{where} has classes that training does not know: {_some(unknown)}")
    twice = [name for some in (names, known) for name, count in Counter(some).items() if count > 1 and name in names]
    if twice:
        raise ConfigError(f"{where} numbers its classes otherwise, and several have the same name: {_some(twice)}")
    return [places[name] for name in names]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
