"""A set of runs as one self-contained HTML page, and each of its figures as PNG and SVG beside it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nepa_scale.config import ConfigError
from nepa_scale.scaling import report_tables as tables
from nepa_scale.scaling.metrics import Metric, logged_metrics
from nepa_scale.scaling.recorded_runs import COLLAPSED_COSINE, COLLAPSED_RANK, RecordedRun, Row, collapse
from nepa_scale.scaling.report_ablations import RepeatedTable, ablation_sections, repeated_tables
from nepa_scale.scaling.report_figures import (
    Figure,
    Series,
    baselines,
    cost_figures,
    cost_rows,
    curve_figures,
    curve_rows,
    diagnostic_figures,
    frontier_figure,
    frontier_rows,
)
from nepa_scale.scaling.report_law_figures import law_figures
from nepa_scale.scaling.report_laws import MetricLaw, fit_metric
from nepa_scale.scaling.report_page import Section, data_names, render
from nepa_scale.scaling.report_theme import save, standalone

Progress = Callable[[str, float], None]  # told what is being done, and the share that is done


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    data: of the figures, by the names they read it by
    """

    title: str
    runs: list[RecordedRun]
    laws: list[MetricLaw]
    collapsed: dict[str, str]
    ablations: list[RepeatedTable]
    sections: list[Section]
    data: dict[str, list[Row]]

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]

    def facts(self) -> dict[str, Any]:
        """The same as one JSON object."""
        metrics = logged_metrics(self.runs)
        return {
            "title": self.title,
            "runs": [_run_facts(run) | {"collapsed": self.collapsed.get(run.name)} for run in self.runs],
            "metrics": {metric.name: metric.title for metric in metrics},
            "laws": {found.metric.name: found.facts() for found in self.laws},
            "ablations": {one.table.name: one.facts() for one in self.ablations},
            "frontier": {
                name.removeprefix("frontier_"): rows for name, rows in self.data.items() if "frontier" in name
            },
            "figures": [figure.name for figure in self.figures],
        }


def make_report(
    runs: list[RecordedRun], title: str, progress: Progress, bootstrap: int = 200, with_changed: bool = False
) -> Report:
    """Fits the laws, and lays out what the runs have to show.

    bootstrap: resamplings for the laws' intervals; 0: none
    with_changed: whether runs whose settings changed under way count in laws and frontiers
    """
    metrics, series = logged_metrics(runs), Series(runs)
    collapsed = {run.name: why for run in runs if (why := collapse(run))}
    sound = [run for run in runs if run.name not in collapsed and (with_changed or not run.mixed)]
    sought = [metric for metric in metrics if metric.law]
    laws = []
    for number, metric in enumerate(sought):
        progress(f"fitting the law of {metric.title}", number / len(sought))
        laws.append(fit_metric(metric, runs, bootstrap, with_changed))

    curves, costs = curve_rows(runs, metrics, series), cost_rows(runs, series)
    frontiers = {metric: frontier_rows(metric, sound, series) for metric in sought if _several_have(metric, sound)}
    data = {"curves": curves, "costs": costs} | {f"frontier_{one.name}": rows for one, rows in frontiers.items()}
    drawn: list[Figure] = []
    for found in laws:
        figures, read = law_figures(found)
        drawn += figures
        data |= read

    troubles, bad = tables.trouble_table(runs), tables.collapse_table(collapsed) if collapsed else None
    forms, ablations = tables.form_table(laws), repeated_tables(runs)
    changes = tables.change_table(runs)
    where, how = tables.environment_table(runs), tables.commands(runs)
    sections = [
        *ablation_sections(ablations),
        Section("runs", "Runs", table=tables.run_table(runs, metrics, collapsed)),
        *([Section("changes", "Settings changed under way", _CHANGES, changes)] if changes else []),
        Section("curves", "Quality over training", figures=curve_figures(metrics, curves, series, baselines(runs))),
        Section("frontier", "Frontier of the training curves", figures=[frontier_figure(m, series) for m in frontiers]),
        Section("laws", "Scaling laws", _LAWS, tables.law_table(laws) if laws else None, drawn),
        *([Section("forms", "Other forms of law", _FORMS, forms)] if forms else []),
        Section("cost", "FLOPs, memory and throughput", figures=cost_figures(costs, series)),
        Section("collapse", "Collapse diagnostics", _COLLAPSE, bad, diagnostic_figures(curves, series)),
        Section("failures", "Failures", "" if troubles else _NO_TROUBLES, troubles),
        Section("environment", "Environment and commands", table=where, commands=how),
    ]  # fmt: skip
    return Report(title, runs, laws, collapsed, ablations, sections, data)


_LAWS = (
    "L(N, D) = E + A / N^α + B / D^β, fitted to the final values of the runs that finished, did not collapse and kept "
    "their settings (or were asked for all the same); in small print their 90% bootstrap intervals. N: parameters, D: "
    "images seen, C: training FLOPs."
)
_CHANGES = (
    "What differs between a step and the one before it. Where that bears on what is learnt, the run is of no one "
    "recipe, and laws and frontiers leave it out unless asked to take it; ablations always do."
)
_FORMS = (
    "Those of N and D are fitted to all runs, those of C to the frontier: runs that no cheaper one beats. AICc weighs "
    "fit against the number of free numbers, within a metric and kind; below 4 two forms are as good as each other. "
    "The error is of the fifth of the runs with the most compute, predicted from the others."
)
_COLLAPSE = (
    f"A run counts as collapsed where its last targets have a mean cosine above {COLLAPSED_COSINE}, or an effective "
    f"rank below {COLLAPSED_RANK:g}; it is left out of laws and frontiers."
)
_NO_TROUBLES = "Every run finished, and none skipped a step or a sample."


def _several_have(metric: Metric, runs: Sequence[RecordedRun]) -> bool:
    """Of one run the frontier is its own curve."""
    return sum(bool(run.values(metric.key)) for run in runs) > 1


def write_report(report: Report, output: Path, progress: Progress) -> dict[str, Any]:
    """Writes `output`, and its figures as *.png and *.svg to `figures_folder`; returns the facts, with the files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = figures_folder(output)
    _require_writable(output, folder)
    specs = {figure.name: figure.chart.to_dict() for figure in report.figures}
    files = []
    for number, figure in enumerate(report.figures):
        progress(f"drawing {figure.title}", number / len(specs))
        spec = specs[figure.name]
        read = {name: report.data[name] for name in data_names(spec)}
        files += save(standalone(spec, figure.title, read), folder / figure.name)
    progress(f"writing {output}", 1.0)
    read_by_some = set().union(*map(data_names, specs.values())) if specs else set()
    data = {name: rows for name, rows in report.data.items() if name in read_by_some}
    page = render(report.title, _summary(report.runs), report.sections, specs, data)
    output.write_text(page, encoding="utf-8")
    return report.facts() | {"page": str(output), "bytes": len(page.encode()), "files": [str(file) for file in files]}


def figures_folder(output: Path) -> Path:
    """Beside the page, and named by it."""
    return output.with_name(f"{output.stem}_figures")


def _require_writable(output: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, output.parent):
            if not os.access(place, os.W_OK):
                raise PermissionError(13, "Permission denied")
        if output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}; choose another with --output") from error


def _summary(runs: Sequence[RecordedRun]) -> str:
    count = Counter(run.status for run in runs)
    states = ", ".join(f"{count[status]} {status}" for status in ("finished", "unfinished", "failed") if count[status])
    flops = sum(run.last("flops_seen") or 0.0 for run in runs)
    plural = "runs" if len(runs) > 1 else "run"
    return (
        f"{len(runs)} {plural} ({states}), {flops:.3g} training FLOPs; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def _run_facts(run: RecordedRun) -> dict[str, Any]:
    memory = run.values("peak_memory_bytes")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "size": run.size,
        "objective": run.objective,
        "parameters": run.parameters,
        "status": run.status,
        "share": run.share,
        "said": run.said,
        "samples_seen": run.last("samples_seen"),
        "flops_seen": run.last("flops_seen"),
        "peak_memory_bytes": max(memory) if memory else None,
        "final": {metric.name: value for metric in logged_metrics([run]) if (value := metric.final(run)) is not None},
        "weights": {metric.name: of for metric in logged_metrics([run]) if (of := metric.weights(run)) is not None},
        "skipped_steps": run.skipped_steps,
        "bad_samples": run.bad_samples,
        "provenance": run.provenance,
        "starts": [start.facts for start in run.record.starts] if run.record else [],
        "changes": [dataclasses.asdict(change) for change in run.changes],
    }
