"""Which shards a source names: folders, tars, patterns, lists and URLs of them, and what is known of them at once."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import braceexpand

from nepa_scale.config import ConfigError
from nepa_scale.data.class_names import numbers_of
from nepa_scale.data.description import FILE_NAME, Description, ShardDescription
from nepa_scale.data.remote import PIPE, MissingRemote, RefusedRemote, Remote, is_remote


@dataclass(frozen=True)
class Source:
    """Shards in order, by path or URL, and what `dataset.json` files say of them.

    class_names: where all name their classes: each name once, those of the first folder before those of the next
    labels: by path or URL, where a folder's classes are not numbered so: the number of each label's name
    """

    locations: list[str]
    described: dict[str, ShardDescription]
    classes: int | None
    class_names: list[str] | None
    labels: dict[str, list[int]]


def resolve(source: str, remote: Remote) -> Source:
    """Resolves a folder, a tar, a brace or glob pattern, a URL or `pipe:` command, a `.txt` file with one of these a
    line, or several of them joined by `::`.

    Raises:
        ConfigError: nothing is there, or a `dataset.json` is damaged.
        RemoteError: a server does not answer.
    """
    finder = _Finder(remote)
    locations = [location for part in _parts(source) for location in finder.find(part)]
    if not locations:
        raise nothing_found(source)
    by_folder = {folder: finder.description(folder) for folder in dict.fromkeys(map(_parent, locations))}
    by_name = {
        (folder, shard.name): shard for folder, found in by_folder.items() for shard in (found.shards if found else [])
    }
    places = {location: (_parent(location), _name(location)) for location in locations}
    described = {location: by_name[place] for location, place in places.items() if place in by_name}
    classes, names, labels = None, None, {}
    if len(described) == len(places):
        folders = {folder: description for folder, description in by_folder.items() if description}
        if all(description.classes is not None for description in folders.values()):
            classes = max(description.classes or 0 for description in folders.values())
        lists = {folder: description.class_names for folder, description in folders.items()}
        if None not in lists.values():
            names, numbers = _united({folder: one for folder, one in lists.items() if one is not None})
            classes = len(names) if numbers else classes
            labels = {location: numbers[folder] for location, (folder, _) in places.items() if folder in numbers}
    return Source(locations, described, classes, names, labels)


def _united(lists: dict[str, list[str]]) -> tuple[list[str], dict[str, list[int]]]:
    """One list of the classes of several folders; and for those that are numbered otherwise, each label's number."""
    first = next(iter(lists.values()))
    if all(names == first for names in lists.values()):
        return first, {}
    united = list(dict.fromkeys(name for names in lists.values() for name in names))
    return united, {folder: numbers_of(names, united, folder) for folder, names in lists.items()}


def nothing_found(source: str) -> ConfigError:
    """The error for a source without shards, with the way to make some."""
    if "data/demo" in source:
        remedy = "make the demo's with `make demo`"
    else:
        remedy = "make them with `python tools/make_shards.py IMAGES FOLDER`"
    return ConfigError(f"no shards are found at '{source}': {remedy}")


def _parts(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.suffix == ".txt" and path.is_file():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the list of shards {path}: {error}") from error
        return [line for line in lines if line and not line.startswith("#")]
    return [part.strip() for part in source.split("::") if part.strip()]


class _Finder:
    """Expands parts of a source; reads each `dataset.json` once."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._descriptions: dict[str, Description | None] = {}

    def find(self, part: str) -> Iterator[str]:
        """The shards of one folder, pattern or URL."""
        if is_remote(part):
            self._remote.check(part)
            for url in braceexpand.braceexpand(part):
                yield from self._find_url(url.removeprefix("file://"))
            return
        path = Path(part).expanduser()
        names = [str(path)] if path.exists() else braceexpand.braceexpand(str(path))
        for name in names:
            if Path(name).is_dir():
                yield from self._folder(name) or sorted(map(str, Path(name).glob("*.tar")))
            elif glob.has_magic(name) and not Path(name).exists():
                yield from sorted(glob.glob(name))
            else:
                yield name

    def _find_url(self, url: str) -> list[str]:
        if url.startswith(PIPE) or not is_remote(url):
            return [url] if url.startswith(PIPE) else list(self.find(url))
        web = urlsplit(url).scheme in ("http", "https")
        if not web and glob.has_magic(url):
            return self._remote.matching(url)
        if urlsplit(url).path.endswith(".tar"):
            return [url]
        return self._folder(url.rstrip("/")) or ([] if web else self._remote.matching(f"{url.rstrip('/')}/*.tar"))

    def _folder(self, folder: str) -> list[str]:
        description = self.description(folder)
        return [f"{folder}/{shard.name}" for shard in description.shards] if description else []

    def description(self, folder: str) -> Description | None:
        """The `dataset.json` of a folder or of a URL's parent; None where there is none."""
        if folder not in self._descriptions:
            where = f"{folder}/{FILE_NAME}" if folder else FILE_NAME
            self._descriptions[folder] = self._read(where)
        return self._descriptions[folder]

    def _read(self, where: str) -> Description | None:
        if where.startswith(PIPE):
            return None
        try:
            content = self._remote.read_small(where) if is_remote(where) else Path(where).read_bytes()
        except (MissingRemote, RefusedRemote, FileNotFoundError, NotADirectoryError):
            return None
        return Description.from_json(content, where)


def _parent(location: str) -> str:
    if location.startswith(PIPE):
        return PIPE
    return location.split("?")[0].rpartition("/")[0] if is_remote(location) else str(Path(location).parent)


def _name(location: str) -> str:
    return location.rpartition("/")[2] if is_remote(location) else Path(location).name
