"""The published ablations of the method (arXiv 2512.16922), and the runs that repeat them.

Each row has a file, configs/ablations/TABLE/ROW.yaml, which sets its switches over a base that has every part of the
method on. What counts as failing was fixed before the first of these runs was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nepa_scale.config import Config, flatten, to_dict
from nepa_scale.scaling.recorded_runs import RecordedRun, collapse

Switches = dict[str, bool | float]

WHOLE: Switches = {
    "shift": True,
    "causal": True,
    "stop_gradient": True,
    "mask_ratio": 0.0,
    "layer_scale": True,
    "rope": True,
    "qk_norm": True,
    "gated_mlp": True,
}
SATURATED = 1e-3  # of 1 + loss: nothing is left to predict (the whole method ends near 0.005 at full scale)

_VARIED = (  # keys in which rows of a table may differ, or which do not change what is learnt
    "objective.shift", "objective.causal", "objective.stop_gradient", "objective.mask_ratio",
    "model.layer_scale", "model.rope", "model.qk_norm", "model.mlp",
    "train.seed", "train.resume", "output", "tracker", "strategy", "activation_checkpointing",
    "activation_memory_budget", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class AblationRow:
    """
    changed: the switches that differ from `WHOLE`
    published: top-1 in percent after fine-tuning on ImageNet-1k; None: it is reported to fail
    """

    name: str
    published: float | None
    changed: Switches

    @property
    def switches(self) -> Switches:
        return WHOLE | self.changed


@dataclass(frozen=True)
class AblationTable:
    """columns: the switches it is about; steps: of pretraining, as published; None: not said"""

    name: str
    title: str
    columns: tuple[str, ...]
    steps: int | None
    rows: tuple[AblationRow, ...]


def _row(name: str, published: float | None, **changed: bool | float) -> AblationRow:
    return AblationRow(name, published, changed)


TABLES = (
    AblationTable(
        "objective", "Shift, causal attention, stop-gradient", ("shift", "causal", "stop_gradient"), 50_000,
        (
            _row("no_shift", None, shift=False),
            _row("not_causal", 73.6, causal=False),
            _row("no_stop_gradient", None, stop_gradient=False),
            _row("full", 76.8),
        ),
    ),
    AblationTable(
        "masking", "Masked inputs", ("mask_ratio",), None,
        (_row("none", 78.2), _row("40", 76.4, mask_ratio=0.4), _row("60", 75.7, mask_ratio=0.6)),
    ),
    AblationTable(
        "architecture", "Parts of the architecture", ("layer_scale", "rope", "qk_norm", "gated_mlp"), 100_000,
        (
            _row("bare", 78.2, layer_scale=False, rope=False, qk_norm=False, gated_mlp=False),
            _row("layer_scale", 77.4, rope=False, qk_norm=False, gated_mlp=False),
            _row("layer_scale_rope", 80.2, qk_norm=False, gated_mlp=False),
            _row("layer_scale_rope_qk_norm", None, gated_mlp=False),
            _row("layer_scale_rope_gated", 81.1, qk_norm=False),
            _row("full", 81.3),
        ),
    ),
)  # fmt: skip


def switches_of(config: Config) -> Switches:
    objective, model = config.objective, config.model
    return {
        "shift": objective.shift,
        "causal": objective.causal,
        "stop_gradient": objective.stop_gradient,
        "mask_ratio": objective.mask_ratio,
        "layer_scale": model.layer_scale is not None,
        "rope": model.rope,
        "qk_norm": model.qk_norm != "none",
        "gated_mlp": model.mlp != "gelu",
    }


def repeated(table: AblationTable, runs: Sequence[RecordedRun]) -> list[list[RecordedRun]]:
    """For each row of the table the finished pretrainings that repeat it from first to last, one a seed.

    They are alike in all but the switches; where the runs hold several such groups, those of the one that has most of
    the table. All lists are empty where no group has two rows, as there is nothing to compare then.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        if run.config is None or run.status != "finished" or run.mixed:
            continue
        if run.config.task == "pretrain" and run.config.objective.name == "next_embedding":
            groups.setdefault(_all_else(run.config), []).append(run)
    by_row = [[_of_row(row, group) for row in table.rows] for group in groups.values()]
    best = max(by_row, key=_rows_filled, default=[])
    return best if _rows_filled(best) > 1 else [[] for _ in table.rows]


def finetuned(pretraining: RecordedRun, runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The finished fine-tunings that began with the weights of a pretraining."""
    return [
        run
        for run in runs
        if run.config is not None
        and run.config.task == "finetune"
        and run.status == "finished"
        and not run.mixed
        and Path(run.config.finetune.weights or "").name == pretraining.folder.name
    ]


def _of_row(row: AblationRow, group: Sequence[RecordedRun]) -> list[RecordedRun]:
    return [run for run in group if run.config is not None and switches_of(run.config) == row.switches]


def _rows_filled(by_row: Sequence[Sequence[RecordedRun]]) -> int:
    return sum(bool(runs) for runs in by_row)


def _all_else(config: Config) -> str:
    return str(sorted((key, value) for key, value in flatten(to_dict(config)).items() if key not in _VARIED))


def failure(run: RecordedRun) -> str:
    """By which of three symptoms the run fails, a word and a sentence; empty where it shows none.

    Collapse: of the targets (`recorded_runs.collapse`). Saturation: 1 + loss is below `SATURATED`. No gain: the linear
    probe is no better than on the same network before its first step.
    """
    loss, probes = run.last("one_plus_loss"), run.values("probe_top1")
    if why := collapse(run):
        return f"collapse: {why}"
    if loss is not None and loss < SATURATED:
        return f"saturation: 1 + loss is {loss:.1e}"
    if len(probes) > 1 and probes[-1] <= probes[0]:
        return f"no gain: the probe has {probes[-1]:.1%}, and {probes[0]:.1%} on the untrained network"
    return ""
