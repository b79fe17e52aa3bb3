"""The classifier: pooling, loss, and the switches that fine-tuning uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_scale.config import ConfigError, ModelConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier
from tests.models import reference
from tests.models.test_against_reference import TINY, settings_of

CLASSES = 7


def classifier(dtype: torch.dtype = torch.float32, drop_path: float = 0.0, **options: Any) -> Classifier:
    architecture = resolve_architecture(ModelConfig(**TINY, qk_norm="affine", drop_path=drop_path))
    module = Classifier(CausalViT(architecture, dtype), CLASSES, **options)
    reference.randomize(module)
    return module


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def expected_logits(module: Classifier, causal: bool, rope_scale: float = 1.0) -> Tensor:
    backbone = reference.weights_of(module.backbone)
    settings = settings_of(module.backbone, causal=causal, rope_scale=rope_scale)
    _, tokens = reference.forward(backbone, images(), settings)
    w = reference.weights_of(module)
    if "fc_norm.weight" in w:
        pooled = reference.layer_norm(
            sum(tokens[:, 1 + n] for n in range(9)) / 9, w["fc_norm.weight"], w["fc_norm.bias"]
        )
    else:
        pooled = tokens[:, 9]
    return pooled @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_logits(pooling: str, causal: bool) -> None:
    module = classifier(pooling=pooling, causal=causal)
    out = module(images())
    assert out.keys() == {"logits"}
    torch.testing.assert_close(out["logits"].double(), expected_logits(module, causal), rtol=0, atol=1e-5)
    assert (expected_logits(module, causal) - expected_logits(module, not causal)).abs().max() > 1e-3


def test_rope_scale_reaches_the_backbone() -> None:
    module = classifier()
    logits = module(images(), rope_scale=torch.tensor(1.3))["logits"]
    torch.testing.assert_close(logits.double(), expected_logits(module, False, 1.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_with_class_indices(smoothing: float) -> None:
    module = classifier(label_smoothing=smoothing)
    labels = torch.tensor([0, 6, 3])
    out = module(images(), labels=labels)
    log_p = out["logits"].double().log_softmax(dim=-1)
    picked = -torch.stack([log_p[n, label] for n, label in enumerate(labels)])
    expected = (1 - smoothing) * picked + smoothing * -log_p.mean(dim=-1)
    assert out["loss"].item() == pytest.approx(expected.mean().item(), abs=1e-6)


def test_loss_with_soft_targets() -> None:
    module = classifier()
    targets = torch.rand(3, CLASSES, generator=torch.Generator().manual_seed(0))
    targets /= targets.sum(dim=1, keepdim=True)
    out = module(images(), labels=targets)
    expected = -(targets.double() * out["logits"].double().log_softmax(dim=-1)).sum(dim=-1).mean()
    assert out["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    one_hot = torch.eye(CLASSES)[[0, 6, 3]]
    by_index = module(images(), labels=torch.tensor([0, 6, 3]))
    assert module(images(), labels=one_hot)["loss"].item() == pytest.approx(by_index["loss"].item(), abs=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_keeps_head_and_loss_in_fp32(autocast: bool) -> None:
    module = classifier(torch.bfloat16)
    labels = torch.tensor([0, 6, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = module(images(), labels=labels)
        _, tokens = module.backbone(images(), causal=False)
    assert tokens.dtype == torch.bfloat16
    assert out["logits"].dtype == out["loss"].dtype == torch.float32
    w = reference.weights_of(module)
    pooled = reference.layer_norm(tokens[:, 1:].double().mean(dim=1), w["fc_norm.weight"], w["fc_norm.bias"])
    expected = pooled @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(out["logits"].double(), expected, rtol=0, atol=1e-5)


def test_every_parameter_learns() -> None:
    module = classifier()
    module(images(), labels=torch.tensor([0, 6, 3]))["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_drop_path_is_drawn_from_the_keys() -> None:
    module = classifier(drop_path=0.5).train()
    keys = torch.arange(3)
    first, again = (module(images(), sample_keys=keys)["logits"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, module(images(), sample_keys=keys + 100)["logits"])
    assert torch.equal(module.eval()(images(), sample_keys=keys)["logits"], module(images())["logits"])


def test_units_are_the_embedding_and_the_blocks() -> None:
    module = classifier()
    assert module.units == [module.backbone.embedding, *module.backbone.blocks]


def test_impossible_classifiers_are_refused() -> None:
    backbone = classifier().backbone
    with pytest.raises(ConfigError, match="at least one class, not 0"):
        Classifier(backbone, 0)
    with pytest.raises(ConfigError, match="pooling=max is not one of mean, last"):
        Classifier(backbone, 2, pooling="max")
