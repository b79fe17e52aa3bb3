"""The pretraining objectives by name: what the rest of the program asks about them."""

from __future__ import annotations

from torch import Tensor

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import CausalViT
from nepa_scale.objectives.diagnostics import collapse_diagnostics, spectrum_sample, target_diagnostics
from nepa_scale.objectives.jepa import JointEmbedding
from nepa_scale.objectives.mae import MaskedAutoencoder
from nepa_scale.objectives.next_embedding import NextEmbedding

Pretext = NextEmbedding | MaskedAutoencoder | JointEmbedding
PRETRAINING_ONLY = ("decoder.", "predictor.")  # how the names of parameters begin that no backbone has


def build_pretext(backbone: CausalViT, objective: ObjectiveConfig) -> Pretext:
    """The module of `objective.name`. Raises ConfigError where the backbone cannot serve it."""
    return _MODULES[objective.name](backbone, objective)


def is_causal(objective: ObjectiveConfig) -> bool:
    """Whether the backbone's attention is causal, in pretraining and hence where its features are judged."""
    return objective.name == "next_embedding" and objective.causal


def encoding(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The switches of `NextEmbedding` with which a backbone of this objective gives its features."""
    return objective if objective.name == "next_embedding" else ObjectiveConfig(causal=is_causal(objective))


def needs_teacher(objective: ObjectiveConfig) -> bool:
    """Whether the module takes `targets` from the moving average of its own weights."""
    return objective.name == "jepa"


def pretext_diagnostics(outputs: dict[str, Tensor], *, spectrum: bool = True) -> dict[str, Tensor]:
    """What to log beside the loss, from a module's outputs for a micro-batch: scalars on the device.

    spectrum: with the targets' effective rank, which otherwise can be had of their `spectrum_targets`
    """
    if "embeddings" in outputs:
        found = collapse_diagnostics(outputs["embeddings"], outputs["predictions"], spectrum=spectrum)
        # of the loss itself, also where the objective does not shift
        return found | {"one_plus_loss": 1.0 + outputs["loss"].double(), "centred_loss": 1.0 - found["centred_cosine"]}
    return target_diagnostics(outputs["targets"], spectrum=spectrum) if "targets" in outputs else {}


def spectrum_targets(outputs: dict[str, Tensor]) -> Tensor | None:
    """Some of the targets of a micro-batch, float32 [rows, D], for `effective_rank`; None where there are none."""
    targets = outputs["embeddings"][:, 1:] if "embeddings" in outputs else outputs.get("targets")
    return None if targets is None else spectrum_sample(targets)


_MODULES: dict[str, type[Pretext]] = {"next_embedding": NextEmbedding, "mae": MaskedAutoencoder, "jepa": JointEmbedding}
