"""benchmarks/step.py: the peer computes what we compute, and the command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nepa_scale.config import ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from tests.launch import REPOSITORY, write_shards
from tests.models.reference import randomize

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("mlp", "qk_norm"), [("gelu", "plain"), ("swiglu", "none")])
def test_the_peer_computes_the_same_loss_and_gradients(
    mlp: str, qk_norm: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from official_style import PlainViT

    model = ModelConfig(width=32, depth=2, heads=2, patch_size=8, image_size=32, mlp=mlp, qk_norm=qk_norm)
    architecture = resolve_architecture(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours = NextEmbedding(CausalViT(architecture, dtype), ObjectiveConfig())
    randomize(ours)
    plain = PlainViT(32, 2, 2, architecture.mlp_width, 8, gated=mlp == "swiglu", qk_norm=qk_norm != "none")
    plain.load(ours.backbone.state_dict())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = ours(images)["loss"]
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = plain(images)
    expected.backward()
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)
    qkv = ours.backbone.blocks[0].attention.qkv.weight.grad
    parts = torch.cat([plain.get_parameter(f"blocks.0.{name}.weight").grad for name in ("query", "key", "value")])
    assert (qkv - parts).norm() < tolerance * parts.norm() * (1 if precision == "fp32" else 3)


@pytest.mark.slow
def test_the_command_runs_small(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    command = [
        sys.executable, str(BENCHMARKS / "step.py"), "--size", "vit_ti", "--image-size", "56", "--batch", "16",
        "--rounds", "1", "--shards", str(shards), "--output", str(tmp_path / "step.json"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "step.json").read_text())
    assert set(facts["strategies"]["rate_of_ddp"]) == {"fsdp", "zero3"}
    modes = facts["recompute"]["modes"]
    assert modes["none"]["saved"] == 0 < modes["none"]["saved_of_not_compiled"]
    assert 0 < modes["selective"]["saved"] < modes["full"]["saved"] < 1
    assert modes["a memory budget of 0.5"]["saved"] > 0.4
    assert sum(facts["loop"].values()) == pytest.approx(1.0)
    assert facts["loop"]["forward and backward"] > 0.3
    assert "plain PyTorch" in (tmp_path / "step.md").read_text()
