"""What a linear segmentation says of itself: in words, and as pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nepa_scale.data.segmentation_folder import IGNORED
from nepa_scale.evaluation.loading import source_of

Pixels = NDArray[np.uint8]
_UNCOUNTED = (0.13, 0.13, 0.13)


def describe(facts: dict[str, Any]) -> str:
    """The result for people; the classes with the best and the worst IoU, where there are many."""
    blocks = ", ".join(map(str, facts["blocks"]))
    kind = "causal" if facts["causal"] else "bidirectional"
    ranked = sorted((row for row in facts["per_class"] if row["iou"] is not None), key=lambda row: -row["iou"])
    shown = ranked if len(ranked) <= 12 else [*ranked[:6], *ranked[-6:]]
    known = f" ({facts['val_in_train']:.1%} training images)" if facts["val_in_train"] else ""
    lines = [
        f"{source_of(facts)}, blocks {blocks}, {kind}, {facts['side']} pixels",
        f"  {facts['classes']} classes{', label 0 ignored' if facts['zero_is_ignored'] else ''}; "
        f"{facts['train_images']:,} training and {facts['val_images']:,} validation images{known}; "
        f"{facts['seconds']:.0f} s",
        f"  {'mIoU':<26}{facts['miou']:.1%}",
        f"  {'mean accuracy of classes':<26}{facts['mean_accuracy']:.1%}",
        f"  {'pixel accuracy':<26}{facts['pixel_accuracy']:.1%}",
        *(f"    label {row['label']:>3}   IoU {row['iou']:.1%}" for row in shown),
    ]
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[tuple[str, Pixels, Pixels, Pixels]]) -> None:
    """Writes a picture of images, labels and predictions side by side, a row for each (name, image, label, prediction).

    image: [h, w, 3]; label, prediction: classes [H, W]; pixels whose label does not count are dark in the label only
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [label.shape[0] / label.shape[1] for _, _, label, _ in rows]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(9, sum(3 * height + 0.25 for height in heights)), height_ratios=heights,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for line, (name, image, label, prediction) in zip(axes, rows, strict=True):
        for place, picture in zip(line, (image, _coloured(label), _coloured(prediction)), strict=True):
            place.imshow(picture, extent=(0, label.shape[1], label.shape[0], 0), interpolation="nearest")
            place.set_axis_off()
        line[0].set_title(name, fontsize=9)
    for place, title in zip(axes[0], (rows[0][0], "label", "prediction"), strict=True):
        place.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _coloured(classes: Pixels) -> NDArray[np.float64]:
    """Each class in a colour of its own, [H, W, 3]: hues a golden ratio apart, so that neighbours differ."""
    table = np.empty((256, 3))
    for number in range(256):
        table[number] = colorsys.hsv_to_rgb(
            number * 0.618034 % 1, 0.45 + 0.25 * (number % 3), 0.95 - 0.2 * (number % 2)
        )
    table[IGNORED] = _UNCOUNTED
    return table[classes]
