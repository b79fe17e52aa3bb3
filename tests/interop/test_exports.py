"""What an export takes along of its run, and what it leaves alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import CenterCrop, Resize

from nepa_scale.config import load_config, to_dict
from nepa_scale.data.description import Description
from nepa_scale.interop import load_official
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import Classifier
from nepa_scale.training.checkpoint import Checkpointer
from tests.training.checkpoint_ranks import whole_state
from tools import export, import_weights

NAMES = ["tabby", "tiger cat", "Siamesisch", "ocelot"]
PREPARED = ["evaluate.crop_share=0.95", "evaluate.squash=true", "data.interpolation=bicubic"]


def write_run(folder: Path, *overrides: str, names: list[str] | None = None, step: int = 3) -> Path:
    """A fine-tuned run with one checkpoint."""
    sizes = ["width=48", "depth=2", "heads=3", "patch_size=8", "image_size=32"]
    config = load_config(None, ["task=finetune", *(f"model.{size}" for size in sizes), *overrides])
    task = Classifier(CausalViT(resolve_architecture(config.model)), len(NAMES))
    state = whole_state(5, {name: tuple(p.shape) for name, p in task.named_parameters()})
    meta = {"step": step, "samples_seen": 8, "dataset_samples": 4, "config": to_dict(config), "class_names": names}
    checkpointer = Checkpointer(folder, keep=1, rank=0, world_size=1)
    checkpointer.save(step, state, replicated=True, meta=meta)
    checkpointer.close()
    return folder


def call(monkeypatch: pytest.MonkeyPatch, tool: Any, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    status = tool.main()
    assert isinstance(status, int)
    return status


def test_timm_gets_the_runs_own_preparation_and_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", *PREPARED, names=NAMES)
    assert call(monkeypatch, export, run, tmp_path / "out", "--to", "timm") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == NAMES
    data = resolve_model_data_config(model)
    found = {name: data[name] for name in ("crop_pct", "crop_mode", "interpolation")}
    assert found == {"crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bicubic"}
    assert tuple(data["mean"]) == tuple(data["std"]) == (0.5, 0.5, 0.5)
    assert tuple(data["input_size"]) == (3, 32, 32)
    resize, crop = create_transform(**data).transforms[:2]
    assert isinstance(resize, Resize)
    assert isinstance(crop, CenterCrop)
    assert resize(Image.new("RGB", (80, 60))).size == (33, 33)  # int(32 / 0.95), without keeping the aspect
    card = (tmp_path / "out" / "README.md").read_text()
    assert "resized to 33 x 33 (bicubic), cropped to 32 x 32" in card
    assert "| tabby, tiger cat, Siamesisch, ocelot |" in card


def test_the_official_layout_gets_them_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "data.interpolation=bicubic", names=NAMES)
    assert call(monkeypatch, export, run, tmp_path / "out", "--to", "hf") == 0
    assert "--to official" in capsys.readouterr().err
    prepared = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert prepared["image_processor_type"] == "ViTImageProcessor"
    assert prepared["size"] == {"height": 32, "width": 32}
    assert prepared["resample"] == Image.Resampling.BICUBIC
    assert prepared["image_mean"] == prepared["image_std"] == [0.5] * 3
    assert prepared["rescale_factor"] == pytest.approx(1 / 255)
    assert all(prepared[f"do_{name}"] is True for name in ("resize", "rescale", "normalize"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    assert config["label2id"] == {name: index for index, name in enumerate(NAMES)}
    assert load_official(tmp_path / "out").class_names == NAMES
    # and on to timm, with what somebody else has changed
    (tmp_path / "out" / "preprocessor_config.json").write_text(
        json.dumps(prepared | {"image_mean": [0.4, 0.5, 0.6], "crop_mode": "squash", "crop_pct": 0.9, "resample": 1})
    )
    assert call(monkeypatch, import_weights, tmp_path / "out", tmp_path / "timm", "--to", "timm") == 0
    written = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert written["label_names"] == NAMES
    found = written["pretrained_cfg"]
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == ("lanczos", 0.9, "squash")
    assert (found["mean"], found["std"]) == ([0.4, 0.5, 0.6], [0.5] * 3)
    (tmp_path / "out" / "preprocessor_config.json").write_text(json.dumps({"resample": "soft"}))
    assert call(monkeypatch, import_weights, tmp_path / "out", tmp_path / "timm", "--to", "timm") == 2
    assert "preprocessor_config.json cannot be understood" in capsys.readouterr().err


def test_names_come_from_the_shards_where_the_checkpoint_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "shard-000000.tar").touch()
    described = {"shards": [{"name": "shard-000000.tar", "samples": 0, "bytes": 0, "sha256": ""}]}
    names = Description.from_json(json.dumps(described | {"classes": 4, "class_names": NAMES}), "here")
    (shards / "dataset.json").write_text(names.to_json())
    for source, expected in ((shards, json.dumps(NAMES)), (tmp_path / "gone", None)):
        run = write_run(tmp_path / f"run_{source.name}", f"data.train={source}")
        output = tmp_path / f"{source.name}.safetensors"
        assert call(monkeypatch, export, run, output, "--to", "safetensors") == 0
        with safe_open(output, "pt") as file:
            assert file.metadata().get("class_names") == expected


@pytest.mark.parametrize("layout", ["official", "timm", "safetensors"])
def test_an_export_is_replaced_by_its_own_run_alone(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / ("out.safetensors" if layout == "safetensors" else "out")
    written = output if layout == "safetensors" else output / "model.safetensors"
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", step=4)
    assert call(monkeypatch, export, first, output, "--to", layout, "--weights", "ema") == 0
    averaged = written.read_bytes()
    assert call(monkeypatch, export, first, output, "--to", layout, "--weights", "raw") == 0
    raw = written.read_bytes()
    assert raw != averaged
    capsys.readouterr()
    assert call(monkeypatch, export, second, output, "--to", layout) == 2
    assert str(first) in (message := capsys.readouterr().err)
    assert str(second) in message
    if layout != "safetensors":
        other = "timm" if layout == "official" else "official"
        assert call(monkeypatch, export, first, output, "--to", other) == 2
        (output / "export.json").unlink()
        assert call(monkeypatch, export, first, output, "--to", layout) == 2  # whose weights these are is not known
        assert "no export of a run" in capsys.readouterr().err
    assert written.read_bytes() == raw


def test_a_folder_that_is_no_run_is_named_for_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    for layout in ("official", "timm"):
        assert call(monkeypatch, export, run, tmp_path / layout, "--to", layout) == 0
    capsys.readouterr()
    for tool, folder, said in (
        (export, "timm", "holds weights exported for timm, and no checkpoint"),
        (export, "official", "holds weights in the official layout, and no checkpoint"),
        (import_weights, "timm", "holds weights for timm (nepa_vit_base_patch14_224), not in the official layout"),
    ):
        arguments = ["--to", "timm"] if tool is export else []
        assert call(monkeypatch, tool, tmp_path / folder, tmp_path / "x", *arguments) == 2
        assert said in capsys.readouterr().err


def split_into_shards(folder: Path) -> None:
    """As Hugging Face splits large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names[number::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_with_their_index_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "official"
    call(monkeypatch, export, write_run(tmp_path / "run"), folder, "--to", "official")
    whole = load_official(folder).state_dict()
    split_into_shards(folder)
    shards = load_official(folder).state_dict()
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    for damage, said in (
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": fields["weight_map"] | {"fc_norm.bias": "../x.safetensors"}}, "not a file beside it"),
        ({"weight_map": fields["weight_map"] | {"fc_norm.bias": "x.safetensors"}}, "x.safetensors is missing"),
        ({"weight_map": fields["weight_map"] | {"extra": "model-00001-of-00003.safetensors"}}, "disagree about extra"),
    ):
        index.write_text(json.dumps(damage))
        capsys.readouterr()
        assert call(monkeypatch, import_weights, folder, tmp_path / "x.safetensors") == 2
        assert said in capsys.readouterr().err


class Call:
    """Unpickled, it would run."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_the_official_trainers_average_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "official", tmp_path / "x.safetensors"
    call(monkeypatch, export, write_run(tmp_path / "run"), folder, "--to", "official")
    raw = load_file(folder / "model.safetensors")
    average = {name: tensor + 1 for name, tensor in raw.items()}
    head = raw["classifier.bias"]
    for held in (average, {f"module.{name}": tensor for name, tensor in average.items()}, {"state_dict": average}):
        torch.save(held, folder / "pytorch_model_ema.bin")
        for arguments, weights, expected in (([], "ema", head + 1), (["--weights", "raw"], "raw", head)):
            capsys.readouterr()
            assert call(monkeypatch, import_weights, folder, output, *arguments, "--json", "-") == 0
            out, err = capsys.readouterr()
            assert json.loads(out)["weights"] == weights
            assert f"the {weights} ones are taken" in err
            assert torch.equal(load_file(output)["head.bias"], expected)
    with pytest.warns(UserWarning, match="also holds a moving average"):
        assert torch.equal(load_official(folder).task.head.bias, head)
    assert torch.equal(load_official(folder, "ema").task.head.bias, head + 1)
    for damaged in ({"a": Call()}, {"a": 1}, {}, None):
        torch.save(damaged, folder / "pytorch_model_ema.bin")
        capsys.readouterr()
        assert call(monkeypatch, import_weights, folder, output) == 2
        out, err = capsys.readouterr()
        assert "executed" not in out + err.replace("not executed", "")
        assert "pytorch_model_ema.bin" in err
    (folder / "pytorch_model_ema.bin").unlink()
    assert call(monkeypatch, import_weights, folder, output, "--weights", "ema") == 2
    assert "has no moving average" in capsys.readouterr().err
