"""Communication volumes counted on real ranks; plans that fit, that do not, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_scale.config import ConfigError, ModelConfig, load_config
from nepa_scale.models import resolve_architecture
from nepa_scale.profiling import count_flops
from nepa_scale.profiling.communication import Volume, step_volume
from nepa_scale.profiling.devices import find_device
from nepa_scale.profiling.launch_scripts import (
    Source,
    command,
    find_source,
    overrides,
    planned_changes,
    slurm_script,
)
from nepa_scale.profiling.parameters import count_parameters
from nepa_scale.profiling.plan import Assumptions, Job, plan, step_time
from nepa_scale.profiling.plan_report import describe_changes
from tests.profiling.communication_ranks import MODEL, PRECISIONS, STRATEGIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_volumes_are_what_ranks_send(ranks: int, tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
            str(ROOT / "tests/profiling/communication_ranks.py"), str(output),
        ],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(output.read_text())
    parameters = count_parameters(resolve_architecture(MODEL))
    for strategy in STRATEGIES:
        for precision in PRECISIONS:
            predicted, counted = step_volume(strategy, parameters, precision), counts[f"{strategy}/{precision}"]
            for kind in ("all_reduce", "reduce_scatter", "all_gather"):
                # what the formulas leave out: norms, padding, a broadcast of buffers
                assert counted.get(kind, 0) == pytest.approx(
                    getattr(predicted, kind), rel=0.002, abs=0.002 * 4 * parameters
                ), (strategy, precision, kind)


def test_what_a_ring_sends() -> None:
    assert Volume(all_reduce=100).sent(4) == 150
    assert Volume(reduce_scatter=100, all_gather=100).sent(4) == 150
    parameters = 10**6
    sent = {name: step_volume(name, parameters, "fp32").sent(10**6) / 4e6 for name in STRATEGIES}
    assert sent == pytest.approx({"ddp": 2, "zero1": 3, "zero2": 3, "fsdp": 3, "zero3": 2}, rel=1e-4)
    large = step_volume("zero3", 2 * 10**9, "fp32")
    assert large.sent(10**6) / 8e9 == pytest.approx(3, rel=1e-4)


def job(size: str = "vit_g", gpus: int = 8, gpu: str = "h100", **settings: Any) -> Job:
    return Job(ModelConfig(size=size), gpus, find_device(gpu), **settings)


def test_a_plan_fits_and_is_sorted() -> None:
    choices = plan(job())
    assert choices[0].fits
    assert all(choice.memory <= job().usable for choice in choices if choice.fits)
    assert all(c.micro_batch * c.accumulation * 8 == 4096 for c in choices)
    assert choices[0].device_hours == pytest.approx(choices[0].days * 24 * 8)


def test_a_plans_rates_follow_from_its_step_time() -> None:
    """On eight H100s, 989 TFLOP/s each by their data sheet, for 800 epochs of ImageNet in batches of 4096."""
    peak, per_image = 8 * 989e12, count_flops(size="vit_g").train_flops_per_image
    for choice in plan(job()):
        seconds = choice.time.total
        assert choice.images_per_second == pytest.approx(4096 / seconds)
        assert choice.mfu == pytest.approx(4096 * per_image / seconds / peak)
        assert choice.days == pytest.approx(800 * 1_281_167 / 4096 * seconds / 86400)
        # products at 0.6 of the peak: those of the model, what recomputation redoes (at most a forward pass, a third),
        # and the attention kernel's own
        assert 1 < choice.time.products / (4096 * per_image / (0.6 * peak)) < 4 / 3 + 0.1


def test_with_nothing_but_products_the_mfu_is_their_efficiency() -> None:
    ideal = Assumptions(product_efficiency=0.5, bandwidth_efficiency=1e9, link_efficiency=1e9, latency=0.0)
    for choice in plan(job("vit_b", assumptions=ideal)):
        assert choice.time.total == pytest.approx(choice.time.products, rel=1e-3)
        assert choice.recompute == "none"
        assert 0.47 < choice.mfu < 0.5  # the attention kernel computes its scores once more in the backward pass


def test_what_does_not_fit_says_what_would() -> None:
    (single,) = plan(job("vit_7b", 1, "rtx4090"))
    assert not single.fits
    assert "needs GPUs of" in single.change
    by_name = {choice.strategy: choice for choice in plan(job("vit_7b", 8))}
    assert not by_name["ddp"].fits
    assert by_name["fsdp"].fits


def test_more_gpus_are_faster_but_no_cheaper() -> None:
    a = resolve_architecture(ModelConfig(size="vit_l"))
    seconds = {n: step_time(job("vit_l", n), a, "fsdp", 4096 // n, 1, "none").total for n in (8, 64, 512)}
    assert seconds[8] > seconds[64] > seconds[512]
    assert seconds[8] * 8 < seconds[64] * 64 < seconds[512] * 512


def test_thousands_of_gpus_and_ten_billion_parameters() -> None:
    model = ModelConfig(size="vit_7b", width=5120, depth=40, heads=40, mlp_width=20480)
    large = Job(model, 4096, find_device("h100"), global_batch=16384)
    assert count_parameters(resolve_architecture(model)) > 10**10
    assert plan(large)[0].fits


def source_and_job(size: str, words: list[str], gpus: int = 16) -> tuple[Source, Job]:
    source = find_source(None, size, None, words)
    config = source.wanted
    assert config.train.epochs is not None
    return source, job(size, gpus, epochs=config.train.epochs, global_batch=config.train.global_batch_size)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h", "vit_g", "vit_7b"])
def test_the_command_is_the_run_of_the_file_with_what_the_plan_decides(size: str) -> None:
    source, planned = source_and_job(size, [])
    best = plan(planned)[0]
    words = overrides(source, planned, best)
    config = load_config(ROOT / words[0].removeprefix("--config "), words[1:])
    expected = load_config(source.file, [] if size != "vit_7b" else ["model.size=vit_7b", "output=runs/vit_7b14"])
    expected.strategy, expected.activation_checkpointing = best.strategy, best.recompute
    expected.train.micro_batch_size = best.micro_batch
    assert config == expected
    assert config.model.qk_norm == ("plain" if size == "vit_b" else "affine")
    assert config.train.epochs == 1600
    changes = planned_changes(source, planned, best)
    assert changes["strategy"] == ("auto", best.strategy)
    assert not {"model.qk_norm", "train.epochs", "train.global_batch_size", "ema.decay"} & changes.keys()
    assert "--nnodes 2 --nproc_per_node 8" in command(source, planned, best)
    script = slurm_script(source, planned, best)
    assert "--nodes=2" in script
    assert "--ntasks-per-node=8" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_what_is_asked_for_goes_over_the_file_and_is_listed(tmp_path: Path) -> None:
    source, planned = source_and_job("vit_l", ["train.epochs=300", "model.qk_norm=none", "model.image_size=[224, 448]"])
    changes = planned_changes(source, planned, plan(planned)[0])
    assert changes["train.epochs"] == (1600.0, 300.0)
    assert changes["model.qk_norm"] == ("affine", "none")
    text = describe_changes(source.name, changes)
    assert text.startswith("changed in configs/pretrain/vit_l14.yaml:")
    assert "model.image_size: 224 -> [224,448]" in text
    file = tmp_path / "own.yaml"
    file.write_text("model: {size: vit_s, patch_size: 16, layer_scale: null}\ntrain: {epochs: 5}\n")
    own = find_source(file, None, None, [])
    assert own.wanted == own.written == load_config(file)
    assert overrides(own, job("vit_s", 1), plan(job("vit_s", 1))[0])[0] == f"--config {file}"
    with pytest.raises(ConfigError, match=r"objective\.name=mae: only pretraining by next_embedding"):
        find_source(ROOT / "configs/pretrain/vit_b16_mae.yaml", None, None, [])


def test_unknown_devices_and_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        find_device("h10")
    with pytest.raises(ConfigError, match="96, 104"):
        plan(job(global_batch=100))
