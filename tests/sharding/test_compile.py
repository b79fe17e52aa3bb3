"""`compile=true` changes the speed, not the losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import TINY, metrics, run_training, write_shards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("torchrun", ["strategy=fsdp", "activation_checkpointing=selective"]),
        ("torchrun", ["strategy=ddp", "activation_checkpointing=full"]),
        ("torchrun", ["strategy=fsdp", "activation_memory_budget=0.5"]),
        ("deepspeed", ["--ds_config", "ds_configs/zero3.json"]),
    ],
    ids=["fsdp", "ddp", "budget", "zero3"],
)
def test_compiled_steps_are_those_of_eager_ones(kind: str, arguments: list[str], tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    common = [*TINY, f"data.train={shards}"]
    assert run_training([*common, f"output={tmp_path / 'eager'}"]).returncode == 0
    compiled = [*arguments, *common, "compile=true", f"output={tmp_path / 'compiled'}"]
    done = run_training(compiled, kind, ranks=2, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, expected in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
