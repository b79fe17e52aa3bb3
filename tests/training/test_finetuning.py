"""Fine-tuning: the recipe's rates to the last constant, the start from pretrained weights, and the real program."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nepa_scale.config import (
    Config,
    ConfigError,
    FinetuneConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from nepa_scale.data.description import Description, ShardDescription
from nepa_scale.interop import save_official
from nepa_scale.interop.official import official_names
from nepa_scale.models import build_vit
from nepa_scale.objectives import Classifier, NextEmbedding
from nepa_scale.sharding import Shard
from nepa_scale.train import main
from nepa_scale.training.checkpoint import locate_checkpoint, read_meta
from nepa_scale.training.finetuning import Finetuning, finetuning_groups, layer_factors
from nepa_scale.training.pretrained import load_backbone
from nepa_scale.training.schedule import Schedule, learning_rate, peak_learning_rate
from tests.launch import REPOSITORY, TINY, metrics, run_training, write_shards

RECIPES = {
    "vit_b": (1.5e-3, 0.65, {"block 0": 5.25e-5, "block 11": 6e-3, "head": 1e-3}),
    "vit_l": (1e-3, 0.75, {"block 0": 5.35e-6, "block 23": 4e-3, "head": 1e-3}),
}


def recipe(size: str) -> Config:
    base_lr, decay, _ = RECIPES[size]
    return Config(
        task="finetune",
        model=ModelConfig(size=size, qk_norm="affine"),
        finetune=FinetuneConfig(layer_decay=decay),
        optimizer=OptimizerConfig(base_lr=base_lr),
        train=TrainConfig(global_batch_size=1024, precision="fp32"),
    )


def names_of(task: Finetuning) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in task.build().named_parameters()]


@pytest.mark.parametrize("size", RECIPES)
def test_peak_rates_are_those_of_the_released_recipe(size: str) -> None:
    config = recipe(size)
    task = Finetuning(config, 1000, 128)
    names = names_of(task)
    groups = task.groups(names)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    rates = {group.label: peak_learning_rate(config) * group.lr_scale for group in groups}
    for label, rate in RECIPES[size][2].items():
        assert rates[label] == pytest.approx(rate, rel=2e-3)
    undecayed = {name for group in groups if group.weight_decay == 0 for name in group.names}
    with torch.device("meta"):
        flat = {name for name, parameter in task.build().named_parameters() if parameter.ndim <= 1}
    assert undecayed == flat | {"backbone.embedding.weight"}  # which is frozen


NAMES = [
    "backbone.embedding.cls_token", "backbone.blocks.0.mlp.up.weight", "backbone.blocks.1.mlp.up.bias",
    "backbone.norm.weight", "fc_norm.weight", "head.bias",
]  # fmt: skip
LABELS = ["embedding", "block 0", "block 1", "pooled norm", "head"]


def test_the_warmup_is_longer_the_earlier_the_block_and_never_none() -> None:
    groups = finetuning_groups(NAMES, layer_factors(2, 0.5, "constant"), 0.1, 0.05)
    assert [group.label for group in groups] == LABELS
    schedule = Schedule(total=101, warmup=21, peak_lr=2.0, final_lr_fraction=0.0, steps_per_epoch=10)
    assert [schedule.warmup_of(group) for group in groups] == [16, 10, 1, 1, 1]  # of 15.75, 10.5, 0, 0, 0
    assert schedule.rates(0, groups) == [0.0] * 5
    assert schedule.rates(1, groups) == [0.5 / 16, 0.1, 2.0, 2.0, 0.2]
    assert schedule.rates(101, groups) == pytest.approx([0.0] * 5)


def test_alike_layers_warm_up_over_the_whole_warmup() -> None:
    groups = finetuning_groups(NAMES, layer_factors(2, 1.0, "constant"), 0.1, 0.05)
    assert groups == finetuning_groups(NAMES, layer_factors(2, 1.0, "linear"), 0.1, 0.05)
    for warmup in (0, 5):
        schedule = Schedule(total=100, warmup=warmup, peak_lr=2.0, final_lr_fraction=0.0, steps_per_epoch=10)
        assert [schedule.warmup_of(group) for group in groups] == [warmup] * 5
    assert schedule.rates(5, groups) == [2.0, 2.0, 2.0, 2.0, 0.2]


def test_linear_decay_is_evenly_spaced() -> None:
    factors = layer_factors(14, 0.35, "linear")
    assert factors == pytest.approx([0.35, *(0.35 + 0.05 * layer for layer in range(14))])


ORACLE = REPOSITORY.parent / "shared" / "oracles" / "nepa_finetune_rates_b.json"


@pytest.mark.skipif(not ORACLE.is_file(), reason="the oracle is not part of the repository")
def test_every_rate_and_decay_is_that_of_the_official_code() -> None:
    expected = json.loads(ORACLE.read_text())
    config = recipe("vit_b")
    assert (peak_learning_rate(config), config.finetune.head_lr) == (expected["base_lr"], expected["head_lr"])
    task = Finetuning(config, 1000, 128)
    with torch.device("meta"):
        module = task.build()
    assert isinstance(module, Classifier)
    theirs = dict(official_names(module))
    groups = task.groups(list(theirs))
    schedule = Schedule(expected["total_steps"], expected["warmup_steps"], expected["base_lr"], 0.0, 100)
    seen = set()
    for number, group in enumerate(groups):
        for name in (official for ours in group.names for official in theirs[ours]):
            seen.add(name)
            if name in expected["frozen"]:
                assert group.label == "frozen"
                continue
            assert group.weight_decay == expected["parameters"][name]["weight_decay"], name
            for step, rate in expected["parameters"][name]["lr"].items():
                assert schedule.rates(int(step), groups)[number] == pytest.approx(rate, rel=1e-12, abs=1e-20), name
    assert seen == {*expected["parameters"], *expected["frozen"]}


def test_the_classifier_starts_as_zeros() -> None:
    config = recipe("vit_b")
    config.model = TINY_MODEL
    task = Finetuning(config, 5, 2)
    held = shards_of(task.build())
    task.initialize(held)
    weights = {shard.name: shard.tensors["master"] for shard in held}
    assert not weights["head.weight"].any()
    assert not weights["head.bias"].any()
    assert weights["backbone.embedding.cls_token"].all()


def test_data_without_labels_and_a_rate_of_0_are_refused() -> None:
    with pytest.raises(ConfigError, match="task=finetune needs labels"):
        Finetuning(recipe("vit_b"), None, 8)
    still = recipe("vit_b")
    still.optimizer.lr = 0.0
    with pytest.raises(ConfigError, match="the peak learning rate is 0"):
        Finetuning(still, 1000, 8)


def shards_of(module: torch.nn.Module) -> list[Shard]:
    return [
        Shard(name, tuple(p.shape), 0, p.numel(), {"master": p.detach().view(-1)})
        for name, p in module.named_parameters()
    ]


TINY_MODEL = ModelConfig(width=48, depth=2, heads=3, patch_size=8, image_size=32, layer_scale=0.1)


def test_an_official_folder_is_a_start(tmp_path: Path) -> None:
    backbone = build_vit("vit_b", 8, 32, width=48, depth=2, heads=3, layer_scale=0.1, seed=3)
    save_official(NextEmbedding(backbone, ObjectiveConfig()), tmp_path)
    task = Classifier(build_vit("vit_b", 8, 32, width=48, depth=2, heads=3, layer_scale=0.1, seed=4), 5)
    load_backbone(str(tmp_path), shards_of(task), TINY_MODEL, average=True)
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, dict(task.named_parameters())[f"backbone.{name}"])
    other = ModelConfig(width=48, depth=2, heads=3, patch_size=8, image_size=32, layer_scale=0.1, rope_theta=50.0)
    with pytest.raises(ConfigError, match=r"rope_theta=100.0, but the run asks for 50.0"):
        load_backbone(str(tmp_path), shards_of(task), other, average=True)
    # beside the average that the official trainer leaves
    raw = load_file(tmp_path / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in raw.items()}, tmp_path / "pytorch_model_ema.bin")
    for average, weights, added in ((None, "ema", 1), (True, "ema", 1), (False, "raw", 0)):
        said = load_backbone(str(tmp_path), shards_of(task), TINY_MODEL, average=average)
        assert said == f"{tmp_path} (official {weights} weights)"
        assert torch.equal(task.backbone.norm.bias, backbone.norm.bias + added)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With names of the classes."""
    folder = write_shards(tmp_path_factory.mktemp("data") / "train")
    described = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            samples = len(tar.getnames()) // 2
        content = shard.read_bytes()
        described.append(ShardDescription(shard.name, samples, len(content), hashlib.sha256(content).hexdigest()))
    (folder / "dataset.json").write_text(Description(described, 4, CLASS_NAMES).to_json())
    return folder


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "val", samples=13, seed=9)


@pytest.fixture(scope="module")
def pretrained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert run_training([*TINY, f"data.train={shards}", f"output={run}"]).returncode == 0
    return run


CLASS_NAMES = ["tabby", "tiger cat", "Siamesisch", "ocelot"]
FINETUNE = [
    *TINY, "task=finetune", "model.drop_path=0.1", "data.interpolation=bicubic", "augment.mixup=0.8",
    "augment.cutmix=1.0", "augment.erase=0.25", "augment.rand_augment=rand-m9-mstd0.5-inc1", "model.qk_norm=affine",
    "ema.decay=0.5",  # 0.5^6 of the initial weights are left: old enough
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(shards: Path, val: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finetuned") / "run"
    done = run_training(
        [*FINETUNE, f"data.train={shards}", f"data.val={val}", f"finetune.weights={pretrained}", f"output={run}"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "block 0" in done.stdout
    assert "(raw weights of step 6): the moving average is 53% initial weights" in done.stdout
    assert "top-1, top-5" in done.stdout
    return run


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param("torchrun", ["strategy=fsdp"], marks=pytest.mark.slow),
        ("deepspeed", ["--ds_config", "ds_configs/zero3.json"]),
        pytest.param("deepspeed", ["--ds_config", "ds_configs/zero1.json"], marks=pytest.mark.slow),
    ],
    ids=["fsdp", "zero3", "zero1"],
)
def test_sharded_fine_tuning_is_that_of_one_process(
    kind: str, arguments: list[str], shards: Path, val: Path, pretrained: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = run_training(
        [*arguments, *FINETUNE, f"data.train={shards}", f"data.val={val}", f"finetune.weights={pretrained}",
         f"output={run}"], kind, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, expected in zip(metrics(run), metrics(alone), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert accuracies(run) == accuracies(alone)


def accuracies(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "evaluation_seconds"} for row in rows if "top1" in row]


def test_a_checkpoint_keeps_the_names_of_its_classes(alone: Path) -> None:
    assert read_meta(locate_checkpoint(alone))["class_names"] == CLASS_NAMES


def test_accuracy_is_of_the_default_weights_and_beside_an_average_of_those_as_trained(alone: Path) -> None:
    first, last = accuracies(alone)
    assert (first["step"], last["step"]) == (0, 6)
    assert (first["weights"], last["weights"]) == ("raw", "ema")
    assert "top1_raw" not in first
    assert first["top5"] == 1.0  # of four classes
    assert {"top1", "top5", "top1_raw", "top5_raw"} <= last.keys()


def test_the_logged_rate_is_the_largest_of_the_plan(shards: Path, alone: Path, tmp_path: Path) -> None:
    words = [*FINETUNE, f"data.train={shards}", "finetune.weights=null", "--dry-run", "--json", f"{tmp_path}/plan.json"]
    assert main(words) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    rates = [
        max(learning_rate(step, peak=group["peak_lr"], warmup=group["warmup_steps"], total=6, final_fraction=0.0)
            for group in plan["groups"])
        for step in range(6)
    ]  # fmt: skip
    assert [row["lr"] for row in metrics(alone)] == rates
    assert rates[0] == 0.0
    assert max(rates) == rates[1] == 1e-3


def test_patches_stay_as_they_were_and_the_rest_is_trained(alone: Path, pretrained: Path) -> None:
    from nepa_scale.training.export import load_task

    before, after = load_task(pretrained, "raw"), load_task(alone, "raw")  # a young average is not what it starts from
    assert isinstance(after, Classifier)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name in ("backbone.embedding.weight", "backbone.embedding.bias"):
        assert torch.equal(old[name], new[name])
    for name in ("backbone.embedding.cls_token", "backbone.blocks.0.attention.qkv.weight", "backbone.norm.weight"):
        assert not torch.equal(old[name], new[name])


def test_another_backbone_is_refused_by_name(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    done = run_training(
        [*FINETUNE, f"data.train={shards}", f"finetune.weights={pretrained}", "model.heads=6", f"output={tmp_path}/run"]
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("holds a backbone with heads=3, but the run asks for 6")
