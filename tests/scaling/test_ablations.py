"""The published ablations: the files set the switches they claim, runs find their rows, failures have a reason."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nepa_scale.config import flatten, load_config, to_dict
from nepa_scale.scaling.ablations import TABLES, WHOLE, AblationRow, AblationTable, failure, repeated, switches_of
from nepa_scale.scaling.recorded_runs import RecordedRun, read_recorded_runs
from nepa_scale.scaling.report_ablations import repeated_tables
from nepa_scale.scaling.sweep import plan_runs, read_sweep
from tests.launch import REPOSITORY

ABLATIONS = REPOSITORY / "configs" / "ablations"
BASES = ("tiny_imagenet.yaml", "vit_b14.yaml")
ROWS = [(table, row) for table in TABLES for row in table.rows]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda part: part.name)
def test_each_file_sets_the_switches_it_claims_and_nothing_else(
    table: AblationTable, row: AblationRow, base: str
) -> None:
    alone = load_config(ABLATIONS / base)
    assert switches_of(alone) == WHOLE
    config = load_config([ABLATIONS / base, ABLATIONS / table.name / f"{row.name}.yaml"])
    assert switches_of(config) == row.switches
    before, after = flatten(to_dict(alone)), flatten(to_dict(config))
    changed = {key for key in after if after[key] != before[key]}
    assert len(changed) == len(row.changed)


def test_each_row_has_a_file_and_each_file_a_row() -> None:
    files = {path.relative_to(ABLATIONS).with_suffix("").as_posix() for path in ABLATIONS.glob("*/*.yaml")}
    assert files == {f"{table.name}/{row.name}" for table, row in ROWS}


@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda part: part.name)
def test_each_file_tells_what_is_published(table: AblationTable, row: AblationRow) -> None:
    first = (ABLATIONS / table.name / f"{row.name}.yaml").read_text().splitlines()[0]
    assert first.endswith("Published: fails." if row.published is None else f"Published: {row.published}.")


def test_the_small_sweep_has_every_row_once() -> None:
    sweep = read_sweep(REPOSITORY / "configs" / "sweeps" / "ablations_small.yaml")
    assert set(sweep.variants) == {f"configs/ablations/{table.name}/{row.name}.yaml" for table, row in ROWS}
    runs = [run for run in plan_runs(dataclasses.replace(sweep, seeds=[0])) if run.after is None]
    assert len(runs) == 11  # two tables' whole methods are the run of the first's
    found = [switches_of(load_config([REPOSITORY / path for path in run.configs])) for run in runs]
    assert all(row.switches in found for _, row in ROWS)


def write_run(folder: Path, row: AblationRow, table: AblationTable, seed: int, **metrics: float) -> None:
    folder.mkdir(parents=True)
    files = [ABLATIONS / "tiny_imagenet.yaml", ABLATIONS / table.name / f"{row.name}.yaml"]
    config = load_config(files, [f"train.seed={seed}", "train.steps=10", f"output={folder}"])
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    last = {"step": 10, "samples_seen": 320, "flops_seen": 1e9, "one_plus_loss": 0.2, "target_cosine": 0.3} | metrics
    rows: list[dict[str, Any]] = [{"step": 0, "probe_top1": 0.09}, last]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))


@pytest.fixture
def runs(tmp_path: Path) -> list[RecordedRun]:
    objective, masking, _ = TABLES
    for row, probe in zip(objective.rows, (0.08, 0.11, 0.12, 0.2), strict=True):
        saturated = {"one_plus_loss": 1e-4} if row.name == "no_stop_gradient" else {}
        for seed in (0, 1):
            write_run(
                tmp_path / f"{row.name}_{seed}", row, objective, seed, probe_top1=probe + 0.01 * seed, **saturated
            )
    write_run(tmp_path / "masked", masking.rows[1], masking, 0, probe_top1=0.15)
    return read_recorded_runs([tmp_path])


def test_runs_find_their_rows(runs: list[RecordedRun]) -> None:
    tables = repeated_tables(runs)
    assert [one.table.name for one in tables] == ["objective", "masking"]
    names = [[run.name for run in found] for found in tables[0].runs]
    assert names == [[f"{row.name}_{seed}" for seed in (0, 1)] for row in TABLES[0].rows]
    assert [len(found) for found in tables[1].runs] == [2, 1, 0]  # the whole method is a row of both


def test_a_run_of_other_settings_is_not_compared(tmp_path: Path, runs: list[RecordedRun]) -> None:
    other = tmp_path / "full_0" / "config.yaml"
    other.write_text(other.read_text().replace("lr: 0.008", "lr: 0.004"))
    names = [[run.name for run in found] for found in repeated(TABLES[0], read_recorded_runs([tmp_path]))]
    assert names[-1] == ["full_1"]
    assert repeated(TABLES[2], runs) == [[]] * 6  # one row alone


def test_failures_have_a_reason(runs: list[RecordedRun]) -> None:
    why = {run.name: failure(run) for run in runs}
    assert why["no_shift_0"] == "no gain: the probe has 8.0%, and 9.0% on the untrained network"
    assert why["no_stop_gradient_0"].startswith("saturation")
    assert why["full_0"] == "" == why["not_causal_1"]
    rank = next(run for run in runs if run.name == "full_0")
    rank.rows[-1]["target_cosine"] = 0.99
    assert "cosine of 0.990" in failure(rank)


def test_a_finetuning_belongs_to_the_row_of_its_pretraining(tmp_path: Path, runs: list[RecordedRun]) -> None:
    folder = tmp_path / "full_1-finetuned"
    folder.mkdir()
    config = load_config(None, ["task=finetune", f"finetune.weights={tmp_path / 'full_1'}", "train.steps=5"])
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "top1": 0.31}) + "\n")
    facts = repeated_tables([*runs, *read_recorded_runs([folder])])[0].facts()
    assert [row["measured"]["top1"] for row in facts] == [[], [], [], [0.31]]
    assert facts[-1]["runs"] == ["full_0", "full_1"]


def test_the_report_prints_measured_beside_published(tmp_path: Path, runs: list[RecordedRun]) -> None:
    page = tmp_path / "out" / "page.html"
    page.parent.mkdir()
    command = [sys.executable, "tools/report.py", *{str(run.folder) for run in runs}, "--output", str(page)]
    done = subprocess.run(
        [*command, "--bootstrap", "0", "--json", str(tmp_path / "out" / "facts.json")], capture_output=True, text=True,
        cwd=REPOSITORY, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "not_causal" in line)
    assert re.findall(r"[\w.%]+", line)[:7] == ["not_causal", "yes", "no", "yes", "73.6", "2", "11.5%"]
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())["ablations"]["objective"]
    assert [row["published"] for row in facts] == ["fail", 73.6, "fail", 76.8]
    assert set(facts[2]["failed"]) == {"no_stop_gradient_0", "no_stop_gradient_1"}
    assert "Ablation: Masked inputs" in page.read_text()
