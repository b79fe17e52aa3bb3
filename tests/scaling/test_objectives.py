"""Runs with different objectives in one sweep: planned by their own FLOPs, shown side by side, never one law."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nepa_scale.config import ConfigError, ObjectiveConfig
from nepa_scale.profiling import count_flops
from nepa_scale.scaling.metrics import find_metric
from nepa_scale.scaling.points import points_of_runs, require_one_objective
from nepa_scale.scaling.recorded_runs import read_recorded_runs
from nepa_scale.scaling.report_laws import fit_metric
from nepa_scale.scaling.sweep import plan_runs, read_sweep
from tests.scaling.recorded_runs import write_run

OBJECTIVES = ["next_embedding", "mae", "jepa"]
SWEEP = {
    "base": "configs/pretrain/demo.yaml", "output": "runs", "sizes": {"small": {"model.width": 64, "model.depth": 2}},
    "budgets": [3e9], "grid": {"objective.name": OBJECTIVES}, "overrides": {"train.global_batch_size": 8},
}  # fmt: skip


def test_a_budget_is_spent_by_each_objective_as_it_costs(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    runs = plan_runs(read_sweep(tmp_path / "sweep.yaml"))
    assert len({run.folder for run in runs}) == 3
    steps = {}
    for run in runs:
        name = run.overrides["objective.name"]
        count = count_flops(
            width=64, depth=2, heads=4, patch_size=8, image_size=48, objective=ObjectiveConfig(name=name)
        )
        assert run.flops == run.samples * count.train_flops_per_image
        assert run.parameters == count.parameters
        assert 3e9 - 8 * count.train_flops_per_image < run.flops <= 3e9
        steps[name] = run.steps
    assert steps["mae"] != steps["next_embedding"]


def test_runs_know_their_objective_and_share_no_law(tmp_path: Path) -> None:
    for number, objective in enumerate(OBJECTIVES):
        folder = write_run(tmp_path / objective, 32, 2, 20 + number)
        described = yaml.safe_load((folder / "config.yaml").read_text())
        described["objective"]["name"], described["model"]["image_size"] = objective, 48
        (folder / "config.yaml").write_text(yaml.safe_dump(described))
    runs = read_recorded_runs([tmp_path])
    assert {run.objective for run in runs} == set(OBJECTIVES)
    assert {run.size for run in runs} == {"w32 d2 p8", "w32 d2 p8 mae", "w32 d2 p8 jepa"}
    metric = find_metric("knn_error", runs)
    with pytest.raises(ConfigError, match="jepa, mae, next_embedding, whose laws are not one"):
        require_one_objective(points_of_runs(runs, metric))
    assert "one objective at a time" in fit_metric(metric, runs, 0).refusal
    require_one_objective(points_of_runs([run for run in runs if run.objective == "mae"], metric))
