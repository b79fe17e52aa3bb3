"""The report's tables: runs, laws, failures, environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nepa_scale.scaling.parametric import ParametricFit
from nepa_scale.scaling.recorded_runs import RecordedRun
from nepa_scale.scaling.report_laws import Metric, MetricLaw
from nepa_scale.scaling.report_page import Cell, Commands, Table
from nepa_scale.training.run_record import shown

_LAW = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β", "a": "N* ~ C^"}


def run_table(runs: Sequence[RecordedRun], metrics: Sequence[Metric], collapsed: dict[str, str]) -> Table:
    """What was run, with the last value of each metric."""
    head = [Cell("run"), Cell("model"), *_numbers("parameters", "images seen", "FLOPs"), Cell("status")]
    head += _numbers(*(metric.title for metric in metrics), "effective rank")
    body = []
    for run in runs:
        row = [
            Cell(run.name),
            Cell(run.size, "model"),
            _number(run.parameters, ","),
            _number(run.last("samples_seen"), ",.0f"),
        ]
        row += [
            _number(run.last("flops_seen"), ".3g"),
            Cell(_status(run, collapsed), "collapsed" if run.name in collapsed else run.status),
        ]
        for metric in metrics:
            shown = metric.final(run)
            of = metric.weights(run)
            value_format = ".1%" if metric.name.endswith("_error") else ".4f"
            row.append(_number(shown, value_format, f"{of} weights" if of else ""))
        body.append([*row, _number(run.last("effective_rank"), ".1f")])
    return Table(head, body)


def _status(run: RecordedRun, collapsed: dict[str, str]) -> str:
    share = f", {run.share:.0%} of its steps" if run.share is not None and run.share < 1 else ""
    changed = ", settings changed" if run.changes else ""
    return f"{run.status}{share}{changed}{', collapsed' if run.name in collapsed else ''}"


def change_table(runs: Sequence[RecordedRun]) -> Table | None:
    """Every setting that changed between one step of a run and the next; None where none did."""
    head = [
        Cell("run"),
        Cell("after step", "number"),
        Cell("setting"),
        Cell("before"),
        Cell("after"),
        Cell("bears on what is learnt"),
    ]
    body = [
        [
            Cell(run.name),
            _number(change.step, ","),
            Cell(change.key),
            Cell(shown(change.old)),
            Cell(shown(change.new)),
            Cell("yes" if change.learnt else "no"),
        ]
        for run in runs
        for change in run.changes
    ]
    return Table(head, body) if body else None


def law_table(laws: Sequence[MetricLaw]) -> Table:
    """E, A, B, alpha, beta with their intervals; where a law is not determined, the sentence that says why."""
    head = [Cell("metric"), *_numbers("runs", *_LAW.values(), "residual of log"), Cell("IsoFLOP")]
    body = []
    for found in laws:
        row = [Cell(found.metric.title), Cell(str(len(found.points.runs)), "number")]
        law = found.law
        if law is None:
            row.append(Cell(f"not determined: {found.refusal}", "sentence", span=len(_LAW) + 1))
        else:
            for name in _LAW:
                low_high = law.intervals.get(name)
                between = f"{low_high[0]:.3g} – {low_high[1]:.3g}" if low_high else ""
                row.append(Cell(law.floor if name == "E" else f"{getattr(law, name):.4g}", "number", between))
            row.append(Cell(f"{law.residual_std:.2%}", "number", _outliers(found, law)))
        body.append([*row, _isoflop(found)])
    return Table(head, body)


def _outliers(found: MetricLaw, law: ParametricFit) -> str:
    """Which runs lie far off the law, and what they would make of it."""
    if not law.outliers:
        return ""
    names = ", ".join(found.points.label(row) for row in law.outliers)
    if law.with_outliers is None:
        return f"outliers, hardly of weight: {names}"
    other = law.with_outliers
    return f"without the outliers {names}; with them α {other.alpha:.4g}, β {other.beta:.4g}"


def _isoflop(found: MetricLaw) -> Cell:
    fit = found.isoflop
    if fit is None:
        return Cell(f"not determined: {found.isoflop_refusal}", "sentence")
    bias = "" if fit.bias is None else f"; on this grid the method is off by {fit.bias:+.3f}"
    between = "{:.3g} – {:.3g}".format(*fit.intervals["exponent"]) if fit.intervals else ""
    return Cell(f"N* ~ C^{fit.exponent:.3f} from {len(fit.budgets)} budgets{bias}", "sentence", between)


def form_table(laws: Sequence[MetricLaw]) -> Table | None:
    """How each form of law does on each metric; None where there are too few runs for any."""
    head = [
        Cell("metric"), Cell("law"), *_numbers("AICc above the best", "residual of log", "error of the largest fifth")
    ]  # fmt: skip
    body = [
        [
            Cell(found.metric.title),
            Cell(form.formula),
            Cell(f"{form.aicc:.1f}", "number"),
            Cell(f"{form.residual_std:.2%}", "number"),
            Cell("" if form.extrapolation_error is None else f"{form.extrapolation_error:.2%}", "number"),
        ]
        for found in laws
        for form in (*found.forms, *found.frontiers)
    ]
    return Table(head, body) if body else None


def collapse_table(collapsed: dict[str, str]) -> Table:
    return Table([Cell("collapsed run"), Cell("why")], [[Cell(run), Cell(why)] for run, why in collapsed.items()])


def trouble_table(runs: Sequence[RecordedRun]) -> Table | None:
    """Runs that failed or have not finished, and those that skipped steps or samples; None where all is well."""
    body = [
        [
            Cell(run.name),
            Cell(run.status, run.status),
            Cell(run.said or "nothing was kept of what it printed", "sentence"),
            _number(run.skipped_steps, ","),
            _number(run.bad_samples, ","),
        ]
        for run in runs
        if run.status != "finished" or run.skipped_steps or run.bad_samples
    ]
    head = [Cell("run"), Cell("status"), Cell("last words"), *_numbers("skipped steps", "bad samples")]
    return Table(head, body) if body else None


def environment_table(runs: Sequence[RecordedRun]) -> Table | None:
    """One row for each machine, commit and set of versions; None where no run says."""
    groups: dict[tuple[tuple[str, str], ...], list[RecordedRun]] = {}
    for run in runs:
        for environment in dict.fromkeys(tuple(_environment(start).items()) for start in _starts(run)):
            groups.setdefault(environment, []).append(run)
    if not groups:
        return None
    keys = list(dict.fromkeys(key for group in groups for key, _ in group))
    body = [
        [Cell(_some([run.name for run in members])), *(Cell(dict(group).get(key, "")) for key in keys)]
        for group, members in groups.items()
    ]
    return Table([Cell("runs"), *map(Cell, keys)], body)


def _starts(run: RecordedRun) -> list[dict[str, Any]]:
    """What each start says of itself; of a run from before starts were kept, what its configuration does."""
    starts = [start.facts for start in run.record.starts] if run.record else []
    return starts or ([run.provenance] if run.provenance else [])


def _environment(found: dict[str, Any]) -> dict[str, str]:
    versions = found.get("versions")
    shown = {
        "machine": found.get("host"),
        "ranks": found.get("world_size"),
        "commit": found.get("commit"),
        "python": found.get("python"),
        **(versions if isinstance(versions, dict) else {}),
    }
    return {str(key): "unknown" if value is None else str(value) for key, value in shown.items()}


def commands(runs: Sequence[RecordedRun]) -> list[Commands]:
    """Of every start of the runs, with its time and the steps that it trained."""
    lines = [
        (f"{run.name} ({start.get('time', start.get('started', 'at an unknown time'))}{_trained(run, start)})", command)
        for run in runs
        for start in _starts(run)
        if (command := str(start.get("command") or ""))
    ]
    return [Commands(f"commands of {len(lines)} starts" if len(lines) > 1 else "command", lines)] if lines else []


def _trained(run: RecordedRun, start: dict[str, Any]) -> str:
    """Which of the run's steps are the start's; nothing where it is the only one."""
    if run.record is None or len(run.record.starts) < 2:
        return ""
    own = [one for one in run.record.segments() if one.start and one.start.number == start["start"]]
    return f", steps {own[0].first} to {own[0].last}" if own else ", no step that is left"


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _numbers(*names: str) -> list[Cell]:
    return [Cell(name, "number") for name in names]


def _number(value: float | None, number_format: str, below: str = "") -> Cell:
    return Cell("–" if value is None else f"{value:{number_format}}", "number", below)
