"""The run folder: whose it is, and the files that a crash may tear."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nepa_scale.config import ConfigError, load_config
from nepa_scale.training.run_folder import JsonLines, forget_after, prepare_run_folder, read_json_lines


def test_a_folder_keeps_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run_folder(run, load_config(None, ["train.steps=5"]))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["train"]["steps"] == 5
    assert saved["provenance"]["versions"]["torch"]
    prepare_run_folder(run, load_config(None, ["train.steps=9", "strategy=ddp"]))  # may change
    for key, value in (("model.size", "vit_l"), ("objective.shift", "false"), ("train.seed", "1")):
        with pytest.raises(ConfigError, match=f"another run: {key} was .* now it is"):
            prepare_run_folder(run, load_config(None, ["train.steps=5", f"{key}={value}"]))


def test_a_fresh_run_does_not_write_over_another(tmp_path: Path) -> None:
    config = load_config(None, ["train.steps=5", "train.resume=none"])
    prepare_run_folder(tmp_path, config)
    JsonLines(tmp_path / "metrics.jsonl").write({"step": 1})
    with pytest.raises(ConfigError, match="already holds this run"):
        prepare_run_folder(tmp_path, config)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        prepare_run_folder(tmp_path / "file", load_config(None))


def test_torn_lines_and_forgotten_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in range(5):
        log.write({"step": step})
    log.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 2, 3, 4]
    forget_after(path, 2)
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 2]
    forget_after(tmp_path / "absent", 2)
