"""What is optimised, given a backbone."""

from nepa_scale.objectives.classification import Classifier
from nepa_scale.objectives.diagnostics import collapse_diagnostics, effective_rank
from nepa_scale.objectives.next_embedding import NextEmbedding, draw_rope_scale, next_embedding_loss, random_mask

__all__ = [
    "Classifier",
    "NextEmbedding",
    "collapse_diagnostics",
    "draw_rope_scale",
    "effective_rank",
    "next_embedding_loss",
    "random_mask",
]
