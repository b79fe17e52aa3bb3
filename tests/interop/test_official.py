"""The official layout both ways: outputs, bit-exact round trips, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.interop import load_official, save_official
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier, NextEmbedding
from tests.models import reference
from tests.models.test_against_reference import TINY, settings_of

CLASSES = 5
FIELDS = {  # of the official config.json
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "use_gated_mlp",
    "image_size", "patch_size", "num_channels", "qkv_bias", "qk_norm", "qk_norm_affine", "qk_norm_bias",
    "layerscale_value", "rope_theta", "layer_norm_eps", "drop_path_prob", "hidden_dropout_prob", "is_causal",
    "add_pooling_layer", "pos_embed_rescale", "pos_embed_shift", "pos_embed_jitter", "initializer_range", "model_type",
    "architectures",
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {"qk_norm": "none"},
    {"qk_norm": "plain"},
    {"qk_norm": "affine"},
    {"qk_norm": "affine", "mlp": "swiglu"},
    {"mlp": "swiglu", "mlp_width": 37, "layer_scale": None},
    {"layer_scale": None, "rope_rescale": 1.0},
    {"patch_size": 14, "image_size": 28, "depth": 1},
    {"patch_size": 16, "image_size": 32, "depth": 3, "rope_theta": 50.0, "drop_path": 0.1, "init_std": 0.01},
]


def backbone(mask_token: bool = False, **model: Any) -> CausalViT:
    vit = CausalViT(resolve_architecture(ModelConfig(**{**TINY, **model}), mask_token))
    reference.randomize(vit)
    return vit


def pretraining(causal: bool = True, **model: Any) -> NextEmbedding:
    return NextEmbedding(backbone(**model), ObjectiveConfig(causal=causal))


def classifier(pooling: str = "mean", causal: bool = False, **model: Any) -> Classifier:
    module = Classifier(backbone(**model), CLASSES, pooling=pooling, causal=causal)
    reference.randomize(module)
    return module


def images(module: NextEmbedding | Classifier) -> Tensor:
    size = module.backbone.architecture.image_size
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


# there and back


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model", VARIANTS, ids=str)
def test_a_pretraining_model_comes_back(model: dict[str, Any], causal: bool, tmp_path: Path) -> None:
    module = pretraining(causal, **model)
    save_official(module, tmp_path)
    loaded = load_official(tmp_path)
    assert not loaded.training
    assert loaded.task.backbone.architecture == module.backbone.architecture
    assert_same_weights(loaded.task, module)
    out, expected = loaded(images(module)), module.eval()(images(module))
    for name in ("loss", "predictions", "embeddings"):
        assert torch.equal(getattr(out, name), expected[name]), name
    assert out.embeddings.shape == out.predictions.shape == (2, module.backbone.architecture.tokens, 32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_classifier_comes_back(mlp: str, pooling: str, causal: bool, tmp_path: Path) -> None:
    module = classifier(pooling, causal, mlp=mlp, qk_norm="affine")
    save_official(module, tmp_path)
    loaded = load_official(tmp_path)
    assert_same_weights(loaded.task, module)
    logits = loaded(images(module)).logits
    assert logits.shape == (2, CLASSES)
    assert torch.equal(logits, module.eval()(images(module))["logits"])


def test_loading_and_saving_gives_the_same_two_files(tmp_path: Path) -> None:
    for number, module in enumerate((pretraining(qk_norm="affine", mlp="swiglu"), classifier())):
        first, second = tmp_path / f"{number}-first", tmp_path / f"{number}-second"
        save_official(module, first)
        save_official(load_official(first), second)
        assert sorted(path.name for path in second.iterdir()) == ["config.json", "model.safetensors"]
        for name in ("config.json", "model.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


def test_fields_of_the_config_survive_even_unknown_ones(tmp_path: Path) -> None:
    save_official(classifier(), tmp_path)
    names = {str(n): f"breed of dog {n}" for n in range(CLASSES)}
    changed = config_of(tmp_path) | {
        "id2label": names,
        "label2id": {name: int(n) for n, name in names.items()},
        "transformers_version": "4.56.2",
        "num_prompt_token": 0,
        "hidden_dropout_prob": 0.1,
        "pos_embed_jitter": 1.1,
        "pos_embed_rescale": 1.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(changed))
    save_official(load_official(tmp_path), tmp_path / "again")
    assert config_of(tmp_path / "again") == changed


def test_a_bare_backbone_is_written_as_a_pretraining_model(tmp_path: Path) -> None:
    vit = backbone(qk_norm="plain")
    save_official(vit, tmp_path)
    loaded = load_official(str(tmp_path))
    assert isinstance(loaded.task, NextEmbedding)
    assert loaded.task.objective == ObjectiveConfig()
    assert_same_weights(loaded.task.backbone, vit)


def test_a_mask_token_travels_too(tmp_path: Path) -> None:
    module = NextEmbedding(backbone(mask_token=True), ObjectiveConfig(mask_ratio=0.4))
    save_official(module, tmp_path)
    assert torch.equal(weights_of(tmp_path)["vit_nepa.embeddings.mask_token"], module.backbone.mask_token.weight)
    assert_same_weights(load_official(tmp_path).task, module)


def test_weights_in_half_precision_are_read_exactly_and_written_as_fp32(tmp_path: Path) -> None:
    save_official(pretraining(), tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in weights_of(tmp_path).items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | {"dtype": "bfloat16"}))
    save_official(load_official(tmp_path), tmp_path / "again")
    assert config_of(tmp_path / "again")["dtype"] == "float32"
    for name, tensor in weights_of(tmp_path / "again").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float()), name


def test_saving_over_the_folder_it_came_from(tmp_path: Path) -> None:
    save_official(pretraining(), tmp_path)
    loaded = load_official(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(2.0)
    save_official(loaded, tmp_path)
    assert_same_weights(load_official(tmp_path), loaded)


# the layout itself


def test_the_layout(tmp_path: Path) -> None:
    module = classifier(qk_norm="affine", mlp="swiglu", depth=2)
    save_official(module, tmp_path)
    layer = [
        "layernorm_before.weight", "layernorm_before.bias", "layernorm_after.weight", "layernorm_after.bias",
        *(f"attention.attention.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")),
        "attention.attention.q_norm.weight", "attention.attention.k_norm.weight",
        "attention.output.dense.weight", "attention.output.dense.bias", "layer_scale.lambda1",
        "intermediate.gate_proj.weight", "intermediate.gate_proj.bias",
        "intermediate.up_proj.weight", "intermediate.up_proj.bias",
        "output.dense.weight", "output.dense.bias", "output.layer_scale.lambda1",
    ]  # fmt: skip
    tensors = weights_of(tmp_path)
    assert set(tensors) == {
        "vit_nepa.embeddings.cls_token",
        "vit_nepa.embeddings.patch_embeddings.projection.weight",
        "vit_nepa.embeddings.patch_embeddings.projection.bias",
        *(f"vit_nepa.encoder.layer.{n}.{name}" for n in range(2) for name in layer),
        "vit_nepa.layernorm.weight",
        "vit_nepa.layernorm.bias",
        "fc_norm.weight",
        "fc_norm.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it the official loader refuses the file
    attention = module.backbone.blocks[1].attention
    inner = "vit_nepa.encoder.layer.1.attention.attention."
    for part, name in enumerate(("query", "key", "value")):
        assert torch.equal(tensors[f"{inner}{name}.weight"], attention.qkv.weight[32 * part : 32 * (part + 1)])
        assert torch.equal(tensors[f"{inner}{name}.bias"], attention.qkv.bias[32 * part : 32 * (part + 1)])
    assert torch.equal(tensors[f"{inner}q_norm.weight"], attention.query_norm.weight)
    assert torch.equal(
        tensors["vit_nepa.encoder.layer.0.layer_scale.lambda1"], module.backbone.blocks[0].attention_scale
    )
    assert torch.equal(
        tensors["vit_nepa.encoder.layer.0.output.layer_scale.lambda1"], module.backbone.blocks[0].mlp_scale
    )


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            lambda: pretraining(),
            {"architectures": ["ViTNepaForPreTraining"], "is_causal": True, "add_pooling_layer": True, "image_size": 12,
             "qk_norm": True, "qk_norm_affine": False, "layerscale_value": 1e-5, "hidden_act": "gelu",
             "use_gated_mlp": False, "pos_embed_rescale": 2.0, "layer_norm_eps": 1e-12, "qk_norm_bias": False},
        ),
        (
            lambda: pretraining(False, qk_norm="none", layer_scale=None, mlp="swiglu", rope_rescale=1.0),
            {"is_causal": False, "qk_norm": False, "qk_norm_affine": False, "layerscale_value": None,
             "hidden_act": "silu", "use_gated_mlp": True, "pos_embed_rescale": None},
        ),
        (
            lambda: classifier("last", True, qk_norm="affine"),
            {"architectures": ["ViTNepaForImageClassification"], "is_causal": True, "add_pooling_layer": False,
             "qk_norm_affine": True, "id2label": {str(n): f"LABEL_{n}" for n in range(CLASSES)},
             "label2id": {f"LABEL_{n}": n for n in range(CLASSES)}},
        ),
        (lambda: classifier(), {"is_causal": False, "add_pooling_layer": True}),
    ],
)  # fmt: skip
def test_the_config(module: Callable[[], NextEmbedding | Classifier], expected: dict[str, Any], tmp_path: Path) -> None:
    save_official(module(), tmp_path)
    config = config_of(tmp_path)
    assert config.keys() >= FIELDS
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_outputs_of_an_official_folder_written_by_hand(pooling: str, tmp_path: Path) -> None:
    """Only the fields that differ from the official defaults, as its own code would accept them."""
    module = classifier(pooling, qk_norm="none")
    save_official(module, tmp_path)
    minimal = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4,
        "image_size": 12, "is_causal": False, "architectures": ["ViTNepaForImageClassification"],
        **({"add_pooling_layer": True} if pooling == "mean" else {}),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(minimal))
    logits = load_official(tmp_path)(images(module)).logits
    _, tokens = reference.forward(
        reference.weights_of(module.backbone), images(module), settings_of(module.backbone, causal=False)
    )
    w = reference.weights_of(module)
    pooled = tokens[:, -1]
    if pooling == "mean":
        pooled = reference.layer_norm(tokens[:, 1:].mean(dim=1), w["fc_norm.weight"], w["fc_norm.bias"])
    torch.testing.assert_close(logits.double(), pooled @ w["head.weight"].T + w["head.bias"], rtol=0, atol=1e-5)


def test_absent_fields_mean_what_they_mean_to_the_official_code(tmp_path: Path) -> None:
    """Without `qk_norm` there is none, without `is_causal` attention is causal, without `layerscale_value` it is on."""
    module = pretraining(qk_norm="none")
    save_official(module, tmp_path)
    config = config_of(tmp_path)
    for name in ("qk_norm", "qk_norm_affine", "is_causal", "layerscale_value", "architectures", "model_type", "dtype"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_official(tmp_path)
    assert torch.equal(loaded(images(module)).loss, module(images(module))["loss"])
    save_official(loaded, tmp_path / "again")
    assert config_of(tmp_path / "again").keys() >= FIELDS


def test_without_architectures_the_weights_say_which_task_it_is(tmp_path: Path) -> None:
    save_official(classifier(), tmp_path)
    config = config_of(tmp_path)
    del config["architectures"], config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(load_official(tmp_path).task, Classifier)


# refusals


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_official(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


LAYER = "vit_nepa.encoder.layer.0."


@pytest.mark.parametrize(
    ("model", "change", "parts"),
    [
        ({"qk_norm": "affine"}, {"qk_norm": False}, [f"hold {LAYER}attention.attention.k_norm", "qk_norm=False"]),
        ({"qk_norm": "affine"}, {"qk_norm_affine": False}, ["hold", "k_norm.weight", "qk_norm_affine=False"]),
        ({"qk_norm": "plain"}, {"qk_norm_affine": True}, ["lack", "k_norm.weight", "qk_norm_affine=True"]),
        ({"qk_norm": "none"}, {"qk_norm": True, "qk_norm_affine": True}, ["lack", "k_norm.weight", "qk_norm=True"]),
        ({"qk_norm": "affine"}, {"qk_norm_bias": True}, ["qk_norm_bias=True is not supported"]),
        ({}, {"layerscale_value": None}, [f"hold {LAYER}layer_scale.lambda1", "layerscale_value=None"]),
        ({"layer_scale": None}, {"layerscale_value": 1e-5}, ["lack", "lambda1", "layerscale_value=1e-05"]),
        ({}, {"use_gated_mlp": True, "hidden_act": "silu"}, ["lack", "gate_proj", "use_gated_mlp=True"]),
        ({"mlp": "swiglu"}, {"use_gated_mlp": False, "hidden_act": "gelu"}, ["hold", "gate_proj", "mlp=False"]),
        ({"mlp": "swiglu"}, {"hidden_act": "gelu"}, ["hidden_act='gelu' with use_gated_mlp=True is not supported"]),
        ({}, {"hidden_act": "relu"}, ["hidden_act='relu' with use_gated_mlp=False is not supported"]),
        ({}, {"num_hidden_layers": 3}, ["lack vit_nepa.encoder.layer.2.", "num_hidden_layers=3"]),
        ({}, {"num_hidden_layers": 1}, ["hold vit_nepa.encoder.layer.1.", "num_hidden_layers=1"]),
        ({}, {"hidden_size": 64}, ["is [1, 1, 32]", "[1, 1, 64]"]),
        ({}, {"intermediate_size": 65}, ["intermediate.up_proj", "[65"]),
        ({}, {"patch_size": 6}, ["projection.weight is [32, 3, 4, 4]", "[32, 3, 6, 6]"]),
        ({}, {"patch_size": 5}, ["image_size=12 is not a multiple"]),
        ({}, {"num_attention_heads": 3}, ["heads that do: 1, 2, 4"]),
        ({}, {"hidden_size": "wide"}, ["'wide'", "whole number"]),
        ({}, {"is_causal": "yes"}, ["is_causal='yes' is not true or false"]),
        ({}, {"layer_norm_eps": 1e-6}, ["layer_norm_eps=1e-06 is not supported, only 1e-12"]),
        ({}, {"qkv_bias": False}, ["qkv_bias=False is not supported"]),
        ({}, {"num_channels": 1}, ["num_channels=1 is not supported"]),
        ({}, {"model_type": "vit"}, ["describes a vit, not a vit_nepa"]),
        ({}, {"architectures": ["ViTModel"]}, ["architectures=['ViTModel'] is not supported"]),
        ({}, {"architectures": ["ViTNepaForImageClassification"]}, ["lack classifier.weight", "ViTNepaForImageClass"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(
    model: dict[str, Any], change: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    save_official(pretraining(**model), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | change))
    message = refused(tmp_path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"add_pooling_layer": False}, ["hold fc_norm.bias", "add_pooling_layer=False"]),
        ({"architectures": ["ViTNepaForPreTraining"]}, ["hold classifier.bias", "ViTNepaForPreTraining"]),
        ({"id2label": {"0": "cat"}}, ["classifier.weight has 5 classes", "names 1"]),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_classifier(change: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    save_official(classifier(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | change))
    message = refused(tmp_path)
    for part in parts:
        assert part in message


def test_last_token_weights_under_a_config_that_pools(tmp_path: Path) -> None:
    save_official(classifier("last"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | {"add_pooling_layer": True}))
    assert "lack fc_norm.bias" in refused(tmp_path)


@pytest.mark.parametrize("name", ["vit_nepa.layernorm.bias", f"{LAYER}attention.attention.key.weight"])
def test_a_missing_tensor_is_named_and_not_filled(name: str, tmp_path: Path) -> None:
    save_official(pretraining(), tmp_path)
    tensors = weights_of(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"lack {name}" in refused(tmp_path)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path / "nowhere")
    save_official(pretraining(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()

    for broken, part in [(text[:50], "not valid JSON"), ("[1]", "must hold an object"), ("{}", "lacks hidden_size")]:
        config.write_text(broken)
        assert part in refused(tmp_path)
    config.write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in refused(tmp_path)
    config.write_text(text)

    for damaged in (b"", b"not safetensors at all", data[:100], data[:-10]):
        weights.write_bytes(damaged)
        assert "not a readable safetensors file" in refused(tmp_path)
    weights.unlink()
    assert "model.safetensors is missing" in refused(tmp_path)
    config.unlink()
    assert "config.json" in refused(tmp_path)


def test_models_for_which_the_layout_has_no_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rotary position.*model\.rope=false"):
        save_official(pretraining(rope=False), tmp_path)
    with pytest.raises(ConfigError, match="square images"):
        save_official(pretraining(image_size=[8, 12]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write the official weights"):
        save_official(pretraining(), tmp_path / "file")
