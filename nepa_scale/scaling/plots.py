"""A fitted law as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nepa_scale.scaling.observations import Numbers
from nepa_scale.scaling.parametric import ParametricFit


def plot_law(
    path: Path, n: Numbers, d: Numbers, loss: Numbers, fit: ParametricFit, names: tuple[str, str, str]
) -> None:
    """Loss against samples, a colour for each size, the law as lines; beside it the residuals against the law.

    names: of parameters, samples and loss
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(3, 2))
    order = np.log(n)
    colours = plt.get_cmap("viridis")((order - order.min()) / max(np.ptp(order), 1e-9))
    left.scatter(d, loss, c=colours, s=26, zorder=3)
    sizes = np.unique(n)
    span = np.geomspace(d.min(), d.max(), 100)
    for size in sizes[np.unique(np.linspace(0, len(sizes) - 1, 8).round().astype(int))]:
        share = (np.log(size) - order.min()) / max(np.ptp(order), 1e-9)
        left.plot(span, fit.predict(np.full_like(span, size), span), color=plt.get_cmap("viridis")(share), lw=1.2,
                  label=f"{size:.2g}")  # fmt: skip
    left.axhline(
        fit.E, color="black", ls="--", lw=1, label=f"E {fit.floor}" if fit.floor.startswith("<") else f"E = {fit.E:.4g}"
    )
    left.set(xscale="log", xlabel=names[1], ylabel=names[2])
    left.set_title(f"{fit.E:.4g} + {fit.A:.4g} / N^{fit.alpha:.3f} + {fit.B:.4g} / D^{fit.beta:.3f}", fontsize=11)
    left.legend(title=names[0], fontsize=8)
    predicted = fit.predict(n, d)
    right.scatter(predicted, 100 * (loss / predicted - 1), c=colours, s=26)
    right.axhline(0, color="black", lw=1)
    right.set(xlabel=f"{names[2]}, by the law", ylabel="measured above the law, %")
    right.set_title("residuals", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
