"""The README.md of exported weights: what they are, what they were trained on, what was measured, how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nepa_scale.config import Config, config_from_dict, to_dict
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.models.sizes import Architecture, size_name
from nepa_scale.objectives import Classifier, NextEmbedding
from nepa_scale.profiling import forward_flops, train_flops
from nepa_scale.training.checkpoint import read_meta
from nepa_scale.training.exported import class_names
from nepa_scale.training.run_folder import read_json_lines
from nepa_scale.training.run_record import describe_changes, record_of_checkpoint
from nepa_scale.training.weights import weights_of

UNTRAINED, PIXELS = "knn_top1_untrained", "knn_top1_pixels"
PERCENTAGES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "knn_top1": "kNN top-1 accuracy, 20 neighbours",
    "probe_top1": "linear probe top-1 accuracy",
    "top1_raw": "top-1 accuracy of the raw weights",
    UNTRAINED: "kNN top-1 accuracy of the untrained network",
    PIXELS: "kNN top-1 accuracy of raw pixels",
}
USE = {
    "official": "from nepa_scale.interop import load_official\n\nmodel = load_official({folder!r})",
    "timm": (
        "import timm\n\nimport nepa_scale.interop.timm\n\n"
        'model = timm.create_model("local-dir:" + {folder!r}, pretrained=True)'
    ),
}
NAMES_SHOWN = 20
CITATION = "Sihan Xu et al.: Next-Embedding Prediction Makes Strong Vision Learners, arXiv 2512.16922 (2025)"


def write_model_card(
    folder: Path, checkpoint: Path, task: NextEmbedding | Classifier, *, layout: str, weights: str
) -> None:
    """Writes README.md into `folder`.

    checkpoint: the step_N folder that `task` was loaded from; the metrics are those of its run up to that step
    layout: "official" or "timm"
    weights: "raw" or "ema"
    """
    meta = read_meta(checkpoint)
    config = config_from_dict(meta["config"], str(checkpoint))
    run = checkpoint.parent.parent
    architecture = task.backbone.architecture
    parts = [
        _front_matter(task, layout),
        f"# {run.name}\n",
        _summary(task, config),
        "## Model\n",
        _table(_model(task, architecture) | _classes(class_names(checkpoint))),
        "## Training\n",
        _table(_training(meta, config, architecture, weights)),
        *_starts(checkpoint, meta),
        "## Quality\n",
        _quality(run, meta["step"], config, weights),
        "## Use\n",
        f"```python\n{USE[layout].format(folder=folder.name)}\n```\n",
        _preparation(Preprocessing.of(config), architecture),
        "## Configuration of the run\n",
        f"```yaml\n{yaml.safe_dump(to_dict(config), sort_keys=False)}```\n",
        "## Method\n",
        CITATION,
    ]
    (folder / "README.md").write_text("\n".join(parts) + "\n")


def _front_matter(task: NextEmbedding | Classifier, layout: str) -> str:
    purpose = "image-classification" if isinstance(task, Classifier) else "image-feature-extraction"
    facts: dict[str, Any] = {"pipeline_tag": purpose, "tags": ["nepa", "causal-vit", purpose]}
    if layout == "timm":
        facts = {"library_name": "timm"} | facts
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


_PRETRAINED = {
    "next_embedding": "A causal Vision Transformer, pretrained by predicting the embedding of the next patch.\n",
    "mae": "A Vision Transformer, pretrained by telling the pixels of hidden patches (masked autoencoding).\n",
    "jepa": "A Vision Transformer, pretrained by telling a teacher's outputs at hidden blocks (joint embedding).\n",
}


def _summary(task: NextEmbedding | Classifier, config: Config) -> str:
    if isinstance(task, Classifier):
        return f"A causal Vision Transformer, fine-tuned to {task.head.out_features:,} classes.\n"
    return _PRETRAINED[config.objective.name]


def _model(task: NextEmbedding | Classifier, a: Architecture) -> dict[str, str]:
    return {
        "parameters": f"{sum(parameter.numel() for parameter in task.parameters()):,}",
        "size": size_name(a),
        "width, depth, heads": f"{a.width}, {a.depth}, {a.heads}",
        "patch": f"{a.patch_size} px: {a.tokens} tokens",
        "forward pass of an image": f"{sum(forward_flops(a).values()) / 1e9:,.2f} GFLOP",
    }


def _classes(names: list[str] | None) -> dict[str, str]:
    """The first of them at least; all are in the files of the weights."""
    if not names:
        return {}
    more = f", ... (all {len(names):,} in config.json)" if len(names) > NAMES_SHOWN else ""
    return {"classes, by label": ", ".join(names[:NAMES_SHOWN]) + more}


def _preparation(preprocessing: Preprocessing, a: Architecture) -> str:
    height, width = a.image_size
    resized = [int(side / preprocessing.crop_share) for side in a.image_size]
    sides = f"to {resized[0]} x {resized[1]}" if preprocessing.squash else f"to {min(resized)} on the shorter side"
    return (
        f"Images are resized {sides} ({preprocessing.interpolation}), cropped to {height} x {width} in the middle and "
        "scaled to [-1, 1] (mean and standard deviation 0.5).\n"
    )


def _training(meta: dict[str, Any], config: Config, a: Architecture, weights: str) -> dict[str, str]:
    seen, samples, batch = meta["samples_seen"], meta["dataset_samples"], config.train.global_batch_size
    objective = config.objective if config.task == "pretrain" else None
    averaged = f"ema: moving average, decay {config.ema.decay:g}" if weights == "ema" else "raw: as trained"
    return {
        "data": f"{config.data.train}: {samples:,} images",
        "images seen": f"{seen:,} ({seen / samples:,.1f} epochs), {meta['step']:,} steps of {batch:,}",
        "training FLOPs": f"{seen * train_flops(a, objective):.3g} (forward and backward)",
        "precision": config.train.precision,
        "weights": averaged,
    }


def _starts(checkpoint: Path, meta: dict[str, Any]) -> list[str]:
    """The command of each start that made steps of the checkpoint, and which settings changed between them."""
    record = record_of_checkpoint(checkpoint)
    if record is None:
        return []
    step, start = meta["step"], meta.get("start")
    rows = {}
    for segment in record.segments(step, start):
        facts = segment.start.facts if segment.start else {} if record.starts else record.provenance
        command = f"`{facts['command']}`" if facts.get("command") else "not recorded here"
        ranks = f", on {facts['world_size']} ranks ({segment.strategy})" if facts.get("world_size") else ""
        rows[f"steps {segment.first:,} to {segment.last:,}"] = f"{command}{ranks}"
    changed = describe_changes(record.changes(step, start))
    return [
        "Commands:\n",
        _table(rows),
        *([f"**The {changed}.** The configuration below is that of the last steps.\n"] if changed else []),
    ]


def _quality(run: Path, step: int, config: Config, weights: str) -> str:
    """What was measured up to `step`, and of which weights: not necessarily those that the card is about."""
    rows = read_json_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    found: dict[str, tuple[str, str]] = {}  # key -> value, weights
    for row in rows:
        if row.get("step", 0) <= step:
            for key in PERCENTAGES.keys() & row.keys():
                measured = "raw" if key.endswith("_raw") else weights_of(row, config)
                of_weights = "" if key == PIXELS else f", {measured} weights"
                found[key] = f"{row[key]:.1%} (step {row['step']:,}{of_weights})", measured
    if not found:
        return "Not evaluated in training.\n"
    table = _table({label: found[key][0] for key, label in PERCENTAGES.items() if key in found})
    if weights not in {measured for key, (_, measured) in found.items() if key not in (PIXELS, UNTRAINED)}:
        table += f"\nThe {weights} weights, which these are, have not been evaluated in training.\n"
    return table


def _table(facts: dict[str, str]) -> str:
    rows = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])
