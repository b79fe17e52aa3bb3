"""tools/import_weights.py: an official folder into this project's layout and into timm's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import nepa_scale.interop.timm  # noqa: F401  (registers the models)
from nepa_scale.interop import save_official
from nepa_scale.models import build_vit
from tests.launch import REPOSITORY


@pytest.fixture
def official(tmp_path: Path) -> Path:
    folder = tmp_path / "official"
    save_official(build_vit("vit_b", 8, 32, seed=1, width=48, depth=2, heads=3, mlp="swiglu"), folder)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = str(REPOSITORY / "tools" / "import_weights.py")
    return subprocess.run([sys.executable, tool, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_both_layouts_hold_the_same_weights(official: Path, tmp_path: Path) -> None:
    done = run(official, tmp_path / "ours.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pretraining model, ")
    expected = build_vit("vit_b", 8, 32, seed=1, width=48, depth=2, heads=3, mlp="swiglu").state_dict()
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == {f"backbone.{name}" for name in expected}
    assert all(torch.equal(found[f"backbone.{name}"], tensor) for name, tensor in expected.items())
    assert run(official, tmp_path / "timm", "--to", "timm").returncode == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.backbone.state_dict().items())


def test_what_is_wrong_is_one_clear_line(official: Path, tmp_path: Path) -> None:
    for arguments, why in (
        ((tmp_path / "nothing", tmp_path / "x"), "config.json"),
        ((official, tmp_path), "is a folder: give the name of a file"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
