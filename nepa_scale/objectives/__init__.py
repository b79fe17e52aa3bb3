"""What is optimised, given a backbone."""

from nepa_scale.objectives.classification import Classifier
from nepa_scale.objectives.diagnostics import collapse_diagnostics, effective_rank
from nepa_scale.objectives.jepa import JointEmbedding
from nepa_scale.objectives.mae import MaskedAutoencoder
from nepa_scale.objectives.next_embedding import NextEmbedding, draw_rope_scale, next_embedding_loss, random_mask
from nepa_scale.objectives.pretext import (
    Pretext,
    build_pretext,
    is_causal,
    needs_teacher,
    pretext_diagnostics,
    spectrum_targets,
)

__all__ = [
    "Classifier",
    "JointEmbedding",
    "MaskedAutoencoder",
    "NextEmbedding",
    "Pretext",
    "build_pretext",
    "collapse_diagnostics",
    "draw_rope_scale",
    "effective_rank",
    "is_causal",
    "needs_teacher",
    "next_embedding_loss",
    "pretext_diagnostics",
    "random_mask",
    "spectrum_targets",
]
