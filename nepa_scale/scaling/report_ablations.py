"""The report's tables of ablations: what was measured beside what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nepa_scale.scaling.ablations import SATURATED, TABLES, AblationRow, AblationTable, failure, repeated
from nepa_scale.scaling.recorded_runs import COLLAPSED_COSINE, COLLAPSED_RANK, RecordedRun
from nepa_scale.scaling.report_page import Cell, Section, Table

ABOUT = (
    "Published: top-1 in percent after fine-tuning ViT-B on ImageNet-1k. Measured: mean over seeds, lowest and "
    f"highest. A run fails where its last targets have a mean cosine above {COLLAPSED_COSINE} or an effective rank "
    f"below {COLLAPSED_RANK:g}, where 1 + loss is below {SATURATED:g}, or where the linear probe is no better than on "
    "the untrained network."
)
# key, title, format; those that no run has are left out
_MEASURED = (
    ("top1", "fine-tuned top-1", ".1%"),
    ("probe_top1", "linear probe", ".1%"),
    ("knn_top1", "kNN", ".1%"),
    ("reference_cosine", "told pixels (cosine)", ".3f"),
    ("one_plus_loss", "1 + loss", ".3f"),
    ("target_cosine", "cosine of targets", ".2f"),
    ("effective_rank", "effective rank", ".1f"),
)


@dataclass(frozen=True)
class RepeatedTable:
    """runs: those of each row"""

    table: AblationTable
    runs: list[list[RecordedRun]]

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "row": row.name,
                "switches": {name: row.switches[name] for name in self.table.columns},
                "published": row.published if row.published is not None else "fail",
                "runs": [run.name for run in runs],
                "failed": {run.name: why for run in runs if (why := failure(run))},
                "measured": {key: [run.last(key) for run in runs] for key, _, _ in self._measured()},
            }
            for row, runs in zip(self.table.rows, self.runs, strict=True)
        ]

    def shown(self) -> Table:
        head = [Cell("row"), *(Cell(name.replace("_", " ")) for name in self.table.columns)]
        head += [
            Cell(title, "number") for title in ("published", "seeds", *(title for _, title, _ in self._measured()))
        ]
        body = [self._line(row, runs) for row, runs in zip(self.table.rows, self.runs, strict=True)]
        return Table([*head, Cell("fails")], body)

    def _line(self, row: AblationRow, runs: Sequence[RecordedRun]) -> list[Cell]:
        switches = [_switch(row.switches[name]) for name in self.table.columns]
        published = "fail" if row.published is None else f"{row.published:.1f}"
        whys = [why for run in runs if (why := failure(run))]
        fails = f"{len(whys)} of {len(runs)}: {whys[0]}" if whys else "no" if runs else ""
        return [
            Cell(row.name),
            *map(Cell, switches),
            Cell(published, "number"),
            Cell(str(len(runs)), "number"),
            *(_mean([run.last(key) for run in runs], form) for key, _, form in self._measured()),
            Cell(fails, "sentence"),
        ]

    def _measured(self) -> list[tuple[str, str, str]]:
        everything = [run for runs in self.runs for run in runs]
        return [measure for measure in _MEASURED if any(run.values(measure[0]) for run in everything)]


def repeated_tables(runs: Sequence[RecordedRun]) -> list[RepeatedTable]:
    """Those of the published tables of which the runs repeat at least two rows."""
    found = [RepeatedTable(table, repeated(table, runs)) for table in TABLES]
    return [one for one in found if any(one.runs)]


def ablation_sections(tables: Sequence[RepeatedTable]) -> list[Section]:
    return [
        Section(f"ablation_{one.table.name}", f"Ablation: {one.table.title}", _about(one.table), one.shown())
        for one in tables
    ]


def _about(table: AblationTable) -> str:
    return ABOUT + (f" Published after {table.steps:,} steps of pretraining." if table.steps else "")


def _switch(value: bool | float) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.0%}"


def _mean(values: Sequence[float | None], form: str) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell("–", "number")
    between = f"{min(known):{form}} – {max(known):{form}}" if len(known) > 1 else ""
    return Cell(f"{sum(known) / len(known):{form}}", "number", between)
