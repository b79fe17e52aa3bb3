"""What both commands of `tools/visualize.py` share: what they are asked for, and the folder of pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nepa_scale.analysis.images import Framing, ImageSet
from nepa_scale.analysis.queries import Place
from nepa_scale.data.listing import Item
from nepa_scale.training.progress import with_progress

INDEX = "index.html"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1500px; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #f4f5f7; padding: 1rem }}
figure {{ margin: 2.5rem 0 }}
img {{ max-width: 100%; border: 1px solid #d5d9de }}
</style></head><body>
<h1>{title}</h1>
<pre>{text}</pre>
{figures}
</body></html>
"""


@dataclass(frozen=True)
class Viewing:
    """The images to look at, and where pictures go.

    places: rows and columns of the queries; empty: the command's own choice
    pictures: how many images of each set are drawn
    limit: how many images of each set are measured; None: all
    """

    sets: Sequence[ImageSet]
    framing: Framing
    places: Sequence[Place]
    pictures: int
    limit: int | None
    output: Path

    def drawn(self) -> Iterator[tuple[ImageSet, Item, Path]]:
        """The images to draw, with progress, and the file of each: its number and its key."""
        chosen = [(one, item) for one in self.sets for item in one.spread(self.pictures).items]
        for number, (one, item) in enumerate(with_progress(chosen, "drawing", len(chosen)), 1):
            key = re.sub(r"[^\w.-]+", "_", item.key)[-80:]
            yield one, item, self.output / f"{number:03d}_{key}.png"

    def measured(self, one: ImageSet) -> Iterator[tuple[int, Item]]:
        """The images of a set to measure, numbered, with progress."""
        items = one.spread(self.limit).items
        return enumerate(with_progress(items, f"measuring {one.name}", len(items)))


def write_gallery(folder: Path, title: str, text: str, pictures: Sequence[tuple[str, str]]) -> None:
    """Writes `folder`/index.html, which needs nothing but the pictures beside it: (file name, caption) each."""
    figures = "\n".join(
        f'<figure><figcaption>{html.escape(caption)}</figcaption><a href="{html.escape(file)}">'
        f'<img src="{html.escape(file)}" alt="{html.escape(caption)}" loading="lazy"></a></figure>'
        for file, caption in pictures
    )
    page = _PAGE.format(title=html.escape(title), text=html.escape(text), figures=figures)
    (folder / INDEX).write_text(page, encoding="utf-8")
