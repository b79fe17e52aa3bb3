"""The program itself: real shards, real processes, every launcher."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, TINY, metrics, run_training, write_shards
from tests.training.wandb_files import offline_runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 samples: no number of ranks divides them."""
    return write_shards(tmp_path_factory.mktemp("data") / "val", samples=13, seed=9)


@pytest.fixture(scope="module")
def reference(shards: Path, val: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, uninterrupted."""
    run = tmp_path_factory.mktemp("reference") / "run"
    arguments = [
        f"data.train={shards}", f"data.val={val}", f"output={run}", "train.log_samples=true", "tracker=wandb",
        "evaluate.probe=true", "train.micro_batch_size=4",
    ]  # fmt: skip
    done = run_training([*TINY, *arguments], WANDB_API_KEY="", NETRC=os.devnull)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_what_it_promises(reference: Path) -> None:
    rows = metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["samples_seen"] == 48
    assert rows[-1]["tokens_seen"] == 48 * 17
    assert rows[-1]["epoch"] == pytest.approx(6 / 5)
    for key in ("grad_norm", "lr", "embedding_std", "effective_rank", "target_cosine", "copy_win", "data_seconds"):
        assert key in rows[-1]
    assert (reference / "checkpoints" / "step_00000006").is_dir()
    assert (reference / "figures" / "curves.png").stat().st_size > 10_000
    assert list((reference / "wandb").glob("offline-run-*"))  # no key, no network, no harm
    steps = [json.loads(line) for line in (reference / "samples" / "rank_0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 7))
    epoch = [key for row in steps[:5] for key in row["keys"]]
    assert len(set(epoch)) == len(epoch) == 40


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param("torchrun", ["strategy=ddp"], marks=pytest.mark.slow),
        ("torchrun", ["strategy=fsdp", "train.micro_batch_size=2"]),
        pytest.param("deepspeed", ["--ds_config", "ds_configs/zero1.json"], marks=pytest.mark.slow),
        pytest.param("deepspeed", ["--ds_config", "ds_configs/zero2.json"], marks=pytest.mark.slow),
        ("deepspeed", ["--ds_config", "ds_configs/zero3.json"]),
        pytest.param("deepspeed", ["--ds_config", "ds_configs/zero3_offload.json"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"],
)
def test_every_launcher_prints_the_same_losses(
    kind: str, arguments: list[str], shards: Path, val: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    gathers_weights = "strategy=fsdp" in arguments or "ds_configs/zero3.json" in arguments
    evaluation = [f"data.val={val}", "evaluate.probe=true"] if gathers_weights else []
    done = run_training([*arguments, *TINY, f"data.train={shards}", f"output={run}", *evaluation], kind, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    if evaluation:
        assert knn(run) == knn(reference)
    for mine, expected in zip(metrics(run), metrics(reference), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        # also of the rows' other numbers; some are of a whole micro-batch, which is 4 images unless an argument says so
        of_batches = () if "train.micro_batch_size=2" in arguments else OF_MICRO_BATCHES
        for name in ("one_plus_loss", "copy_cosine", *of_batches):
            assert mine[name] == pytest.approx(expected[name], rel=1e-4), name


OF_MICRO_BATCHES = ("centred_loss", "embedding_std", "effective_rank", "target_cosine")


@pytest.mark.parametrize(
    ("kind", "ranks", "arguments"),
    [
        pytest.param("python", 1, [], marks=pytest.mark.slow),
        pytest.param("torchrun", 2, ["strategy=fsdp"], marks=pytest.mark.slow),
        pytest.param("deepspeed", 2, ["strategy=zero3"], marks=pytest.mark.slow),
    ],
    ids=["single", "fsdp", "zero3"],
)
def test_resuming_continues_bit_for_bit(
    kind: str, ranks: int, arguments: list[str], shards: Path, tmp_path: Path
) -> None:
    common = [*arguments, *TINY, f"data.train={shards}", "checkpoint.every=3", "schedule.warmup_steps=2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_training([*common, f"output={whole}"], kind, ranks).returncode == 0
    # the same schedule, stopped after three steps by removing what came later
    assert run_training([*common, f"output={halves}"], kind, ranks).returncode == 0
    for name in ("step_00000006",):
        for path in sorted((halves / "checkpoints" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (halves / "checkpoints" / name).rmdir()
    done = run_training([*common, f"output={halves}"], kind, ranks)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stdout
    assert [row["loss"] for row in metrics(halves)] == [row["loss"] for row in metrics(whole)]
    assert [row["grad_norm"] for row in metrics(halves)] == [row["grad_norm"] for row in metrics(whole)]


# found by every Python that starts with the checkout on its path
NOT_INSTALLED = """
import importlib.metadata as metadata

found = metadata.Distribution.from_name

def from_name(name):
    if name.replace("-", "_") == "nepa_scale":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.Distribution.from_name = from_name
"""


def test_a_checkout_that_was_not_installed_saves_and_resumes_as_one_run(shards: Path, tmp_path: Path) -> None:
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    for name in ("nepa_scale", "configs"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    (checkout / "sitecustomize.py").write_text(NOT_INSTALLED)
    command = [*TINY, f"data.train={shards}", f"output={run}", "tracker=wandb", "schedule.warmup_steps=2"]
    for steps in (3, 6):
        done = run_training([*command, f"train.steps={steps}"], checkout=checkout, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stdout
    meta = json.loads((run / "checkpoints" / "step_00000006" / "meta.json").read_text())
    versions = meta.get("values", meta)["versions"]
    assert versions["nepa_scale"] in (REPOSITORY / "pyproject.toml").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ((_, mirrored),) = offline_runs(run).items()
    losses = [(row["step"], row["loss"]) for row in mirrored if "loss" in row]
    assert losses == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == list(range(1, 7))


def knn(run: Path) -> list[dict[str, float]]:
    """The accuracies that a run measured of its features, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "knn_top1" in row]
    assert all(row["features_effective_rank"] > 1 and row["evaluation_seconds"] > 0 for row in evaluations)
    kept = ("knn", "probe", "reference")
    return [{key: round(row[key], 3) for key in row if key.startswith(kept)} for row in evaluations]


BAD_INPUT = [
    (["model.sise=vit_b"], "did you mean 'model.size'"),
    (["train.global_batch_size=7", "train.micro_batch_size=2"], "train.micro_batch_size=2 does not divide"),
    (["data.train=/nowhere"], "/nowhere"),
    (["data.train=null"], "data.train is not set"),
    (["model.image_size=30"], "not a multiple of model.patch_size=8"),
    (["train.global_batch_size=64"], "less than one batch"),
    (["--config", "configs/absent.yaml"], "cannot read the configuration"),
    (["--ds_config", "ds_configs/absent.json"], "cannot read the DeepSpeed configuration"),
    (["--ds_config", "ds_configs/zero3.json", "strategy=fsdp"], "contradicts"),
    (["train.resume=/nowhere/step_1"], "/nowhere/step_1"),
    (["model.mlp=relu"], "gelu, swiglu"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT, ids=[case[0][-1] for case in BAD_INPUT])
def test_bad_input_is_one_clear_line(arguments: list[str], named: str, shards: Path, tmp_path: Path) -> None:
    done = run_training([*TINY, f"data.train={shards}", f"output={tmp_path / 'run'}", *arguments])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert named in lines[0]


def test_bad_input_leaves_no_rank_hanging(shards: Path, tmp_path: Path) -> None:
    arguments = [*TINY, f"data.train={shards}", f"output={tmp_path / 'run'}", "train.global_batch_size=9"]
    done = run_training(arguments, "deepspeed", ranks=2, timeout=120)
    assert done.returncode == 2
    assert "9 does not divide over 2 ranks; nearest that do: 8, 10" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_run_is_refused(reference: Path, shards: Path) -> None:
    done = run_training([*TINY, f"data.train={shards}", f"output={reference}", "train.seed=5"])
    assert done.returncode == 2
    assert "belongs to another run: train.seed was 0, now it is 5" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(shards: Path, tmp_path: Path) -> None:
    arguments = [
        *TINY,
        f"data.train={shards}",
        f"output={tmp_path / 'run'}",
        "checkpoint.every=1",
        "train.max_skipped=2",
    ]
    done = run_training([*arguments, "optimizer.lr=1e38", "optimizer.clip=0", "train.steps=20"])
    assert done.returncode == 1
    assert "steps in a row" in done.stderr
    assert "step_0000" in done.stderr
    assert "Traceback" not in done.stderr
