"""The report's tables of ablations: what was measured beside what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nepa_scale.scaling.ablations import SATURATED, TABLES, AblationRow, AblationTable, failure, finetuned, repeated
from nepa_scale.scaling.recorded_runs import COLLAPSED_COSINE, COLLAPSED_RANK, RecordedRun
from nepa_scale.scaling.report_page import Cell, Section, Table

ABOUT = (
    "Measured: mean over seeds, lowest and "
    f"highest. A run fails by collapse (its last targets have a mean cosine above {COLLAPSED_COSINE} or an effective "
    f"rank below {COLLAPSED_RANK:g}), by saturation (1 + loss is below {SATURATED:g}), or for no gain (the linear "
    "probe is no better than on the untrained network). Told pixels: the cosine between the next patch's pixels and "
    "what the prediction tells of them."
)
# key, title, format; those that no run has are left out
_MEASURED = (
    ("top1", "fine-tuned", ".1%"),
    ("probe_top1", "probe", ".1%"),
    ("reference_cosine", "told pixels", ".3f"),
    ("one_plus_loss", "1 + loss", ".3f"),
    ("effective_rank", "rank", ".1f"),
)


@dataclass(frozen=True)
class RepeatedTable:
    """runs: of each row the pretrainings, and what was fine-tuned from them"""

    table: AblationTable
    runs: list[list[RecordedRun]]
    tuned: list[list[RecordedRun]]

    def facts(self) -> list[dict[str, Any]]:
        return [
            {
                "row": row.name,
                "switches": {name: row.switches[name] for name in self.table.columns},
                "published": row.published if row.published is not None else "fail",
                "runs": [run.name for run in runs],
                "failed": {run.name: why for run in runs if (why := failure(run))},
                "measured": {key: _values(key, runs, tuned) for key, _, _ in self._measured()},
            }
            for row, runs, tuned in zip(self.table.rows, self.runs, self.tuned, strict=True)
        ]

    def shown(self) -> Table:
        head = [Cell("row"), *(Cell(name.replace("_", " ")) for name in self.table.columns)]
        head += [
            Cell(title, "number") for title in ("published", "seeds", *(title for _, title, _ in self._measured()))
        ]
        body = [self._line(*line) for line in zip(self.table.rows, self.runs, self.tuned, strict=True)]
        return Table([*head, Cell("fails")], body)

    def _line(self, row: AblationRow, runs: list[RecordedRun], tuned: list[RecordedRun]) -> list[Cell]:
        switches = [_switch(row.switches[name]) for name in self.table.columns]
        published = "fail" if row.published is None else f"{row.published:.1f}"
        symptoms = [why.partition(":")[0] for run in runs if (why := failure(run))]
        named = ", ".join(dict.fromkeys(symptoms))
        fails = f"{len(symptoms)} of {len(runs)}: {named}" if symptoms else "no" if runs else ""
        return [
            Cell(row.name),
            *map(Cell, switches),
            Cell(published, "number"),
            Cell(str(len(runs)), "number"),
            *(_mean(_values(key, runs, tuned), form) for key, _, form in self._measured()),
            Cell(fails, "failed" if symptoms else ""),
        ]

    def _measured(self) -> list[tuple[str, str, str]]:
        everything = [run for runs in (*self.runs, *self.tuned) for run in runs]
        return [measure for measure in _MEASURED if any(run.values(measure[0]) for run in everything)]


def repeated_tables(runs: Sequence[RecordedRun]) -> list[RepeatedTable]:
    """Those of the published tables of which the runs repeat at least two rows."""
    found = []
    for table in TABLES:
        by_row = repeated(table, runs)
        if any(by_row):
            tuned = [[later for run in of_row for later in finetuned(run, runs)] for of_row in by_row]
            found.append(RepeatedTable(table, by_row, tuned))
    return found


def ablation_sections(tables: Sequence[RepeatedTable]) -> list[Section]:
    """What the columns mean is said in the first."""
    return [
        Section(
            f"ablation_{one.table.name}",
            f"Ablation: {one.table.title}",
            f"{_published(one.table)} {'' if number else ABOUT}",
            one.shown(),
        )
        for number, one in enumerate(tables)
    ]


def _published(table: AblationTable) -> str:
    steps = f" after {table.steps:,} steps of pretraining" if table.steps else ""
    return f"Published{steps}: top-1 in percent of ViT-B, fine-tuned on ImageNet-1k."


def _values(key: str, runs: Sequence[RecordedRun], tuned: Sequence[RecordedRun]) -> list[float | None]:
    """Of fine-tuned accuracy those of the fine-tunings, of all else the pretrainings'."""
    return [run.last(key) for run in (tuned if key == "top1" else runs)]


def _switch(value: bool | float) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.0%}"


def _mean(values: Sequence[float | None], form: str) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell("–", "number")
    between = f"{min(known):{form}}".rstrip("%") + f"–{max(known):{form}}" if len(known) > 1 else ""
    return Cell(f"{sum(known) / len(known):{form}}", "number", between)
