"""A run is one run of wandb, and its history there is the run's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nepa_scale.training.tracking import WandbTracker
from tests.training.wandb_files import offline_runs

PUBLIC = "https://api.wandb.ai"


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class Server:
    """Stands in for the wandb module of somebody who is online: it keeps histories, and refuses steps that go back."""

    def __init__(self, address: str = PUBLIC) -> None:
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.starts: list[dict[str, Any]] = []
        self.Settings, self.teardown = SimpleNamespace, lambda: None
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online", base_url=address))

    def init(self, **options: Any) -> Any:
        self.starts.append(options)
        if "resume_from" in options:
            run_id, step = options["resume_from"].split("?_step=")
            self.histories[run_id] = [row for row in self.histories[run_id] if row["step"] <= int(step)]
        else:
            run_id = options["id"]
        history = self.histories.setdefault(run_id, [])

        def log(row: dict[str, Any], step: int) -> None:
            if not history or step >= history[-1]["step"]:
                history.append(row)

        following = history[-1]["step"] + 1 if history else 0
        return SimpleNamespace(
            step=following, log=log, finish=lambda: None, offline=options.get("mode") == "offline", dir="nowhere/files"
        )


def record(run: Path, tracker: WandbTracker, steps: range, trial: int) -> None:
    """Logs rows as a run does: in metrics.jsonl first."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "loss": -step / 100, "trial": trial}
            file.write(json.dumps(row) + "\n")
            tracker.log(row)


def go_back(run: Path, step: int) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def train_with_detours(run: Path) -> None:
    """Steps 0 to 4; resumed to 6; resumed from 3 to 8, within which it went back from 7 to 5."""
    first = WandbTracker(run, {"a": 1})
    first.go_on_from(-1)
    record(run, first, range(5), 1)
    first.close()
    second = WandbTracker(run, {"a": 1})
    second.go_on_from(4)
    record(run, second, range(5, 7), 2)
    second.close()
    go_back(run, 3)
    third = WandbTracker(run, {"a": 1})
    third.go_on_from(3)
    record(run, third, range(4, 8), 3)
    go_back(run, 5)
    third.go_on_from(5)
    record(run, third, range(6, 9), 4)
    third.close()


TRUTH = [(0, 1), (1, 1), (2, 1), (3, 1), (4, 3), (5, 3), (6, 4), (7, 4), (8, 4)]


def test_offline_a_run_is_one_run_with_the_history_that_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    train_with_detours(run)
    (name, rows), *others = offline_runs(run).items()
    assert not others  # the one synced last would replace the others
    assert (run / "wandb_id").read_text().strip() in name
    assert [(row["step"], row["trial"]) for row in rows] == TRUTH
    assert "goes on without it" not in capfd.readouterr().err


def test_online_a_run_is_one_run_with_the_history_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    train_with_detours(tmp_path)
    ((run_id, rows),) = server.histories.items()
    assert run_id == (tmp_path / "wandb_id").read_text().strip()
    assert [(row["step"], row["trial"]) for row in rows] == TRUTH
    assert all("mode" not in start for start in server.starts)


@pytest.mark.parametrize(
    ("entry", "address", "logged_in"),
    [
        ("machine api.wandb.ai login user password " + "0" * 40, PUBLIC, True),
        ("machine api.wandb.ai login user password " + "0" * 40, "https://api.forge.coreweave.com", True),
        ("machine wandb.lab:8080 login user password " + "0" * 40, "http://wandb.lab:8080", True),
        ("machine api.wandb.ai login user password " + "0" * 40, "http://wandb.lab:8080", False),
        ("machine example.org login user password secret", PUBLIC, False),
        ("machine", PUBLIC, False),  # damaged
        (None, PUBLIC, False),
    ],
)
def test_a_login_in_netrc_is_a_login(
    entry: str | None, address: str, logged_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(address)
    monkeypatch.setitem(sys.modules, "wandb", server)
    if entry is not None:
        (tmp_path / "netrc").write_text(entry + "\n")
    WandbTracker(tmp_path, {}).go_on_from(-1)
    assert (server.starts[0].get("mode") != "offline") == logged_in


def test_a_failure_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    tracker = WandbTracker(tmp_path, {})
    tracker.go_on_from(-1)
    tracker._run.log = None
    for step in range(3):
        tracker.log({"step": step})
    tracker.go_on_from(1)
    tracker.close()
    assert capsys.readouterr().err.count("wandb is not available and this run goes on without it") == 1
