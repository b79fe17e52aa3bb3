"""What the steps of a run were trained with, as its folder says it: by hand-made folders, and by the program itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from nepa_scale.config import Config, load_config
from nepa_scale.training.checkpoint import read_meta
from nepa_scale.training.run_folder import JsonLines, prepare_run_folder, read_json_lines
from nepa_scale.training.run_record import RunRecord, append_start, changes_between
from tests.launch import write_shards
from tests.training.programs import Program, arguments_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


class Folder:
    """A run folder, filled by hand."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.path, self._first = path, ["train.steps=100", *overrides]
        prepare_run_folder(path, self.config())

    def config(self, *overrides: str) -> Config:
        return load_config(None, [*self._first, *overrides])

    def start(self, *overrides: str, step: int = 0, after: int | None = None, before: Config | None = None) -> int:
        """before: what the steps up to `step` were trained with; default: as the first start says"""
        config = self.config(*overrides)
        changed = changes_between(before or self.config(), config, step=step)
        return append_start(
            self.path, config, strategy="single", step=step, after=after, checkpoint=None, changed=changed
        )

    def log(self, step: int) -> None:
        JsonLines(self.path / "metrics.jsonl").write({"step": step})

    def rates(self, **of: int) -> list[tuple[int, int, float | None]]:
        segments = RunRecord.read(self.path).segments(**of)
        return [(one.first, one.last, one.config.optimizer.lr) for one in segments]


def test_the_first_configuration_stays(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "optimizer.lr=1e-3")
    before = (tmp_path / "config.yaml").read_bytes()
    prepare_run_folder(tmp_path, folder.config("optimizer.lr=2e-3"))
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_steps_have_the_settings_of_the_start_that_made_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "optimizer.lr=1e-3")
    first = folder.start()
    folder.log(40)
    second = folder.start("optimizer.lr=2e-3", step=30, after=first)  # ten steps were lost at a kill
    folder.log(60)
    assert folder.rates() == [(1, 30, 1e-3), (31, 60, 2e-3)]
    assert RunRecord.read(tmp_path).config.optimizer.lr == 2e-3
    assert [(str(one), one.step) for one in RunRecord.read(tmp_path).changes()] == [("optimizer.lr 0.001 -> 0.002", 30)]
    assert folder.rates(last=30, start=first) == [(1, 30, 1e-3)]  # of a checkpoint that the first start wrote
    folder.start("optimizer.lr=3e-3", step=60, after=second, before=folder.config("optimizer.lr=2e-3"))
    assert folder.rates() == [(1, 30, 1e-3), (31, 60, 2e-3)]  # it has trained nothing yet
    line = read_json_lines(tmp_path / "starts.jsonl")[-1]
    assert (line["step"], line["changed"]) == (60, {"optimizer.lr": [2e-3, 3e-3]})
    assert line["overrides"] == {"optimizer.lr": 3e-3}
    assert line["time"]
    assert line["command"]
    assert line["versions"]["torch"]
    assert line["world_size"] == 1


def test_steps_that_were_lost_leave_no_trace(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "optimizer.lr=1e-3")
    first = folder.start()
    folder.log(50)
    folder.start("optimizer.lr=2e-3", step=20, after=first)  # goes back, and dies before it has saved
    folder.start("optimizer.lr=1e-3", step=50, after=first)
    folder.log(80)
    assert folder.rates() == [(1, 50, 1e-3), (51, 80, 1e-3)]
    assert RunRecord.read(tmp_path).changes() == []


def test_steps_from_elsewhere_have_the_old_settings(tmp_path: Path) -> None:
    """Of a run that goes on from another one's checkpoint, or began before starts were recorded."""
    folder = Folder(tmp_path, "optimizer.lr=1e-3")
    folder.start("optimizer.lr=2e-3", step=30, before=folder.config("optimizer.lr=5e-3"))
    folder.log(40)
    assert folder.rates() == [(1, 30, 5e-3), (31, 40, 2e-3)]
    assert [one.step for one in RunRecord.read(tmp_path).changes()] == [30]


def test_a_folder_without_starts_is_as_its_configuration_says(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "optimizer.lr=1e-3")
    assert folder.rates() == []
    folder.log(40)
    assert folder.rates() == [(1, 40, 1e-3)]
    assert RunRecord.read(tmp_path).changes() == []


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.start()
    path = tmp_path / "starts.jsonl"
    path.write_text(path.read_text() + '{"start": 2, "step": 3')
    assert folder.start(step=10, after=1) == 2
    assert [start.step for start in RunRecord.read(tmp_path).starts] == [0, 10]
    path.write_text(path.read_text() + "7\n[]\nnull\n{}\n")
    assert len(RunRecord.read(tmp_path).starts) == 2


@pytest.mark.parametrize(
    ("override", "counts", "learnt"),
    [
        ("optimizer.weight_decay=0.3", True, True),
        ("data.crop_scale=[0.3,1.0]", True, True),
        ("ema.decay=0.5", True, True),
        ("train.precision=fp32", True, True),
        ("train.steps=200", True, True),
        ("data.open_shards=3", True, True),
        ("evaluate.bank=7", True, False),
        ("train.log_every=3", True, False),
        ("train.micro_batch_size=2", True, False),
        ("activation_checkpointing=full", True, False),
        ("output=elsewhere", False, False),
        ("data.workers=7", False, False),
        ("data.cache_gigabytes=3", False, False),
        ("tracker=wandb", False, False),
        ("checkpoint.keep_every=5", False, False),
        ("train.resume=none", False, False),
    ],
)
def test_what_counts_as_a_change(override: str, counts: bool, learnt: bool) -> None:
    changed = changes_between(load_config(None, ["train.steps=100"]), load_config(None, ["train.steps=100", override]))
    assert [change.key for change in changed] == ([override.partition("=")[0]] if counts else [])
    assert [change.learnt for change in changed] == ([learnt] if counts else [])


def test_the_strategy_is_the_resolved_one() -> None:
    asked = load_config(None, ["strategy=fsdp"])
    assert changes_between(load_config(None), asked) == []
    assert [str(one) for one in changes_between(asked, asked, ("fsdp", "ddp"))] == ["strategy fsdp -> ddp"]
    assert changes_between(asked, asked, ("fsdp", None)) == []


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("said") / "said"


@pytest.fixture(scope="module")
def finished(shards: Path, said: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert launch(shards, run, said)[0] == 0
    return run


def launch(shards: Path, run: Path, said: Path, *more: str) -> tuple[int, str]:
    """Exit status and output of one process of the program."""
    program = Program(arguments_of(shards, run, "checkpoint.every=3", *more), 1, said)
    return program.wait()[0], program.said()


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_finished_run_with_other_settings_refuses_and_is_left_as_it_is(
    finished: Path, shards: Path, said: Path
) -> None:
    before = contents(finished)
    status, text = launch(
        shards, finished, said, "optimizer.lr=2e-3", "optimizer.weight_decay=0.3", "data.crop_scale=[0.5,1]",
        "ema.decay=0.5", "train.precision=bf16", "strategy=ddp", "data.workers=1",
    )  # fmt: skip
    assert status == 2
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    for change in (
        "optimizer.lr 0.001 -> 0.002", "optimizer.weight_decay 0.05 -> 0.3", "ema.decay 0.9 -> 0.5",
        "data.crop_scale [0.3, 1.0] -> [0.5, 1.0]", "train.precision fp32 -> bf16", "strategy single -> ddp",
    ):  # fmt: skip
        assert change in line
    assert "output=" in line
    assert "more train.steps" in line
    assert "workers" not in line
    status, text = launch(shards, finished, said, "train.steps=4")  # it is past that
    assert status == 2
    assert "train.steps 6 -> 4" in text
    assert contents(finished) == before
    status, text = launch(shards, finished, said, "data.workers=1", "checkpoint.keep=9")
    assert status == 0
    assert "resumed after step 6" in text
    assert "changed" not in text


def test_an_unfinished_run_says_what_changes_and_keeps_every_start(finished: Path, shards: Path, said: Path) -> None:
    first = (finished / "config.yaml").read_bytes()
    starts = len(read_json_lines(finished / "starts.jsonl"))
    status, text = launch(shards, finished, said, "train.steps=9", "optimizer.lr=2e-3")
    assert status == 0, text
    assert text.count("pretrain: width 48 x depth 2 x heads 3, ") == 1  # no size's name: it is none of them
    assert "changed after step 6: optimizer.lr 0.001 -> 0.002" in text
    assert "changed after step 6: train.steps 6 -> 9" in text
    assert "not one schedule" in text
    assert text.index("changed after step 6") < text.index("run folder")
    assert (finished / "config.yaml").read_bytes() == first
    line = read_json_lines(finished / "starts.jsonl")[-1]
    assert (line["start"], line["step"], line["strategy"], line["world_size"]) == (starts + 1, 6, "single", 1)
    assert line["after"] == 1  # the one that trained up to there, whoever has looked at the run since
    assert line["changed"] == {"optimizer.lr": [1e-3, 2e-3], "train.steps": [6, 9]}
    # the record and the checkpoints tell the same
    record = RunRecord.read(finished)
    for step in (6, 9):
        meta = read_meta(finished / "checkpoints" / f"step_{step:08d}")
        assert meta["config"]["optimizer"]["lr"] == record.segments(step, meta["start"])[-1].config.optimizer.lr
    assert [(one.first, one.last, one.config.optimizer.lr) for one in record.segments()] == [(1, 6, 1e-3), (7, 9, 2e-3)]
    # the same command again says that it has finished, the first one does not
    assert launch(shards, finished, said, "train.steps=9", "optimizer.lr=2e-3")[0] == 0
    assert launch(shards, finished, said)[0] == 2
    # going back inside the folder, with the first rate again: of the second, nothing is left
    back = f"train.resume={finished / 'checkpoints' / 'step_00000006'}"
    status, text = launch(shards, finished, said, back, "train.steps=9")
    assert status == 0
    assert "optimizer.lr" not in text
    assert {one.config.optimizer.lr for one in RunRecord.read(finished).segments()} == {1e-3}
