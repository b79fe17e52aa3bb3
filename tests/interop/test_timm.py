"""The backbone as timm's programs see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from nepa_scale.config import ObjectiveConfig
from nepa_scale.interop.timm import save_timm
from nepa_scale.models import build_vit
from nepa_scale.models.initialization import initial_values
from nepa_scale.objectives import Classifier, NextEmbedding

TINY: dict[str, Any] = {"width": 48, "depth": 3, "heads": 3, "layer_scale": 0.1}
NAME = "nepa_vit_base_patch16_224"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def classifier(pooling: str, causal: bool) -> Classifier:
    task = Classifier(build_vit("vit_b", 8, 32, seed=1, qk_norm="affine", **TINY), 7, pooling=pooling, causal=causal)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if not name.startswith("backbone."):
                values = initial_values(name, tuple(parameter.shape), task.backbone.architecture, seed=2)
                parameter.copy_(values)
    return task.eval()


@pytest.mark.parametrize(("pooling", "causal"), [("mean", False), ("last", True)])
def test_an_exported_classifier_gives_its_logits_in_timm(
    tmp_path: Path, images: torch.Tensor, pooling: str, causal: bool
) -> None:
    task = classifier(pooling, causal)
    save_timm(task, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(images), task(images)["logits"])
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_a_pretrained_backbone_gives_its_features_in_timm(tmp_path: Path, images: torch.Tensor) -> None:
    task = NextEmbedding(build_vit("vit_b", 8, 32, seed=1, **TINY), ObjectiveConfig()).eval()
    save_timm(task, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    predictions = task(images)["predictions"]
    assert torch.equal(model.forward_features(images), predictions)
    assert torch.equal(model(images), predictions[:, 1:].mean(1))


def test_timms_names_and_preprocessing() -> None:
    assert len(timm.list_models("nepa_vit_*")) == 18
    model = timm.create_model(NAME, num_classes=10, depth=1)
    data = timm.data.resolve_model_data_config(model)
    assert (data["mean"], data["std"], data["input_size"]) == ((0.5,) * 3, (0.5,) * 3, (3, 224, 224))
    assert data["interpolation"] == "bicubic"
    assert model.get_classifier() is model.head
