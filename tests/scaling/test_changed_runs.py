"""Runs whose settings changed under way: shown as such, with the commands that ran, and left out of laws by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nepa_scale.config import Config, ModelConfig, config_from_dict, to_dict
from nepa_scale.scaling.ablations import TABLES, repeated
from nepa_scale.scaling.metrics import METRICS
from nepa_scale.scaling.points import points_of_runs
from nepa_scale.scaling.recorded_runs import read_recorded_runs
from nepa_scale.scaling.report_tables import change_table, commands, environment_table
from nepa_scale.scaling.sweep import PlannedRun
from nepa_scale.training.run_folder import prepare_run_folder
from nepa_scale.training.run_record import append_start, changes_between, read_first_config
from tests.scaling.recorded_runs import write_run
from tools import fit_scaling, report

LOSS = next(metric for metric in METRICS if metric.name == "one_plus_loss")


def start(folder: Path, step: int, section: str = "", **changed: Any) -> None:
    """A start that goes on from `step`, after the one before it, with other values of `section`."""
    first, _ = read_first_config(folder)
    values = to_dict(first)
    (values[section] if section else values).update(changed)
    config: Config = config_from_dict(values, "")
    append_start(
        folder, config, strategy="single", step=step, after=1 if step else None, checkpoint=None,
        changed=changes_between(first, config, step=step),
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine that a law can be fitted to, and four that went on: one at another rate, one on a schedule of another
    length, one with another evaluation, one without a step."""
    folder = tmp_path / "runs"
    for width, depth in ((32, 2), (48, 3), (64, 4)):
        for steps in (60, 200, 700):
            write_run(folder / f"w{width}-{steps}", width, depth, steps)
    changes: dict[str, tuple[int, str, dict[str, Any]]] = {
        "rate": (40, "optimizer", {"lr": 2e-3}),
        "length": (40, "train", {"steps": 90}),
        "evaluated": (40, "evaluate", {"bank": 7}),
        "untrained": (100, "optimizer", {"lr": 2e-3}),
    }
    for name, (step, section, changed) in changes.items():
        write_run(folder / name, 48, 3, 100)
        monkeypatch.setattr(sys, "argv", ["train.py", "first"])
        start(folder / name, 0)
        monkeypatch.setattr(sys, "argv", ["train.py", "second", "data.train=a b"])
        start(folder / name, step, section, **changed)
    return folder


def test_a_run_with_changes_is_shown_as_one_and_is_in_no_law(runs: Path) -> None:
    by_name = {run.name: run for run in read_recorded_runs([runs])}
    assert by_name["rate"].mixed == "settings changed at step 40: optimizer.lr null -> 0.002"
    assert by_name["length"].mixed == "settings changed at step 40: train.steps 100 -> 90"
    assert by_name["evaluated"].mixed == "" == by_name["untrained"].mixed
    assert by_name["rate"].config is not None
    assert by_name["rate"].config.optimizer.lr == 2e-3
    points = points_of_runs(list(by_name.values()), LOSS)
    assert points.left_out == {name: by_name[name].mixed for name in ("rate", "length")}
    assert points_of_runs(list(by_name.values()), LOSS, with_changed=True).left_out == {}
    table = change_table(list(by_name.values()))
    assert table is not None
    assert sorted([cell.text for cell in row] for row in table.body) == [
        ["evaluated", "40", "evaluate.bank", "50000", "7", "no"],
        ["length", "40", "train.steps", "100", "90", "yes"],
        ["rate", "40", "optimizer.lr", "null", "0.002", "yes"],
    ]
    assert change_table([by_name["untrained"]]) is None


def test_a_sweep_knows_the_run_that_was_changed_by_hand(runs: Path) -> None:
    for name, changed in (("rate", "settings changed at step 40"), ("untrained", ""), ("nowhere", "")):
        planned = PlannedRun(name, runs / name, [], {}, 1, 100, 6400, 1.0)
        assert planned.mixed().startswith(changed)
        assert bool(planned.mixed()) == bool(changed)


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ({"size": "vit_s"}, "vit_s p14"),
        ({"size": "vit_b", "width": 192}, "w192 d12 p14"),  # it has a base model's depth, and is none
        ({"size": "vit_b", "heads": 6}, "w768 d12 h6 m3072 p14"),
    ],
)
def test_a_run_is_called_by_a_size_only_where_it_is_that_size(
    model: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    prepare_run_folder(tmp_path / "run", Config(model=ModelConfig(**model)))
    (run,) = read_recorded_runs([tmp_path / "run"])
    assert run.size == shown


def test_every_command_is_listed_with_the_steps_that_it_trained(runs: Path) -> None:
    by_name = {run.name: run for run in read_recorded_runs([runs])}
    (listed,) = commands([by_name["rate"], by_name["untrained"], by_name["w32-60"]])
    said = [(label.partition(", ")[2].rstrip(")"), command) for label, command in listed.lines]
    assert said == [
        ("steps 1 to 40", "train.py first"),
        ("steps 41 to 100", "train.py second 'data.train=a b'"),
        ("steps 1 to 100", "train.py first"),
        ("no step that is left", "train.py second 'data.train=a b'"),
        ("", "train.py output=w32-60"),
    ]
    found = environment_table(list(by_name.values()))
    assert found is not None
    assert len(found.body) == 1  # one machine


def test_the_tools_leave_them_out_unless_asked(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(tool: Any, name: str, *arguments: str) -> dict[str, Any]:
        file = tmp_path / "facts.json"
        monkeypatch.setattr(sys, "argv", [name, str(runs), *arguments, "--bootstrap", "0", "--json", str(file)])
        assert tool.main() == 0
        read: dict[str, Any] = json.loads(file.read_text())
        return read

    fitted = facts(fit_scaling, "fit_scaling.py", "--loss", "one_plus_loss")
    assert list(fitted["left_out"]) == ["length", "rate"]
    assert fitted["left_out"]["rate"] == "settings changed at step 40: optimizer.lr null -> 0.002"
    more = facts(fit_scaling, "fit_scaling.py", "--loss", "one_plus_loss", "--with-changed")
    assert (more["left_out"], more["runs"]) == ({}, fitted["runs"] + 2)

    monkeypatch.setattr(report, "write_report", lambda found, page, _: found.facts() | {
        "page": str(page), "bytes": 0, "files": [],
    })  # fmt: skip
    shown = facts(report, "report.py", "--output", str(tmp_path / "page.html"))
    (rate,) = [run for run in shown["runs"] if run["name"] == "rate"]
    assert [line["step"] for line in rate["starts"]] == [0, 40]
    assert rate["changes"] == [{"key": "optimizer.lr", "old": None, "new": 2e-3, "step": 40}]
    assert shown["laws"]["one_plus_loss"]["left_out"]["rate"].startswith("settings changed at step 40")
    asked = facts(report, "report.py", "--output", str(tmp_path / "page.html"), "--with-changed")
    assert "rate" in asked["laws"]["one_plus_loss"]["runs"]


def test_an_ablation_is_not_repeated_by_a_run_that_changed(tmp_path: Path) -> None:
    from tests.scaling.test_ablations import write_run as write_ablation

    for row in TABLES[0].rows:
        write_ablation(tmp_path / row.name, row, TABLES[0], 0, probe_top1=0.2)
    assert [len(found) for found in repeated(TABLES[0], read_recorded_runs([tmp_path]))] == [1, 1, 1, 1]
    start(tmp_path / "full", 0, "optimizer", lr=7e-3)
    start(tmp_path / "full", 5)
    assert [len(found) for found in repeated(TABLES[0], read_recorded_runs([tmp_path]))] == [1, 1, 1, 0]
