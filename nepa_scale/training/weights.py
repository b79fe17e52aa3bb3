"""Which weights a number is of: those as trained, "raw", or their moving average, "ema".

One default holds wherever there is a choice: in evaluation while training and afterwards, in exports, pictures and the
start of fine-tuning. It is the moving average where the run has one and it is old enough to mean something: a young
one is mostly the weights that it began with, in pretraining random ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nepa_scale.config import Config, ConfigError, config_from_dict
from nepa_scale.sharding import Strategy
from nepa_scale.training.checkpoint import read_meta
from nepa_scale.training.checkpoint_format import Index, read_index
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.part_files import Corrupt

KINDS = {"raw": "master", "ema": "ema"}  # what a person asks for -> what a checkpoint calls it
WEIGHTS_HELP = "as trained, or their moving average (default: the average, where there is one and it is old enough)"
MOST_INITIAL = 0.05  # share of the initial weights in an average that is old enough
SHARE = "average_initial_share"  # in a checkpoint's meta, and in rows of evaluations


def default_weights(initial_share: float | None) -> str:
    """The rule: "ema" where at most `MOST_INITIAL` of the average are the weights that it began with, else "raw".

    initial_share: the product of the average's decays over its updates; None: there is no average
    """
    return "ema" if initial_share is not None and initial_share <= MOST_INITIAL else "raw"


@dataclass(frozen=True)
class Choice:
    """
    weights: "raw" or "ema"
    step: of the checkpoint
    note: a line for people where the average was passed over since it is young; else empty
    """

    weights: str
    step: int
    note: str = ""

    @property
    def kind(self) -> str:
        """What the checkpoint calls them."""
        return KINDS[self.weights]

    def __str__(self) -> str:
        return f"{self.weights} weights of step {self.step:,}"


def choose_weights(folder: Path, asked: str | None) -> Choice:
    """Which weights of a checkpoint are to be taken.

    folder: a step_N folder
    asked: "raw" or "ema"; None: by default
    Raises:
        ConfigError: the average is asked for and there is none, or the checkpoint is damaged.
    """
    meta, index = read_meta(folder), index_of(folder)
    step, averaged = meta["step"], all(KINDS["ema"] in kinds for kinds in index.ranges.values())
    if asked == "ema" and not averaged:
        raise ConfigError(f"{folder} holds no moving average (ema.decay was 0): give --weights raw")
    if asked is not None or not averaged:
        return Choice(asked or "raw", step)
    share = initial_share(meta)
    weights = default_weights(share)
    return Choice(weights, step, "" if weights == "ema" else _note(share, step))


def index_of(folder: Path) -> Index:
    """Raises ConfigError where `read_index` finds damage."""
    try:
        return read_index(folder)
    except Corrupt as error:
        raise ConfigError(f"no usable checkpoint: {error}") from error


def initial_share(meta: dict[str, Any]) -> float:
    """Of the average in a checkpoint. One that does not say was written at a constant decay, and averaged all along."""
    if meta.get(SHARE) is not None:
        return float(meta[SHARE])
    decay = config_from_dict(meta["config"], "the checkpoint's configuration").ema.decay
    return float(decay ** meta.get("optimizer_steps", meta["step"]))


def weights_of(row: dict[str, Any], config: Config | None) -> str:
    """Those that an evaluation's row is of. Rows once named none: fine-tuning then took the average, pretraining not.

    config: the run's
    """
    if "weights" in row:
        return str(row["weights"])
    return "ema" if config is not None and config.task == "finetune" and config.ema.decay > 0 else "raw"


def _note(share: float, step: int) -> str:
    return (
        f"the moving average is {share:.0%} initial weights after {step:,} steps: raw weights are taken; "
        "--weights ema for the average"
    )


@contextmanager
def applied_by_default(average: MovingAverage | None, strategy: Strategy) -> Iterator[dict[str, Any]]:
    """Within the context the strategy's module computes with the weights that numbers are of by default. Collective.

    Yields what a row is to say of them: `weights`, and where there is an average its `average_initial_share`. Waits for
    the device.
    """
    if average is None:
        yield {"weights": "raw"}
        return
    share = average.initial_share()
    facts = {"weights": default_weights(share), SHARE: share}
    if facts["weights"] == "raw":
        yield facts
        return
    with average.applied(strategy):
        yield facts
