"""Is the model learning, or is the target collapsing? Numbers to read beside the loss.

The target of next-embedding prediction is itself trained, so a falling loss may mean better prediction or easier
targets. Shapes: B images, T = 1 + patches tokens (CLS first), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.counter_random import uniform

SPECTRUM_ROWS = 512  # of the targets, drawn at random: bounds the cost of the effective rank whatever the batch


@torch.no_grad()
def collapse_diagnostics(embeddings: Tensor, predictions: Tensor) -> dict[str, Tensor]:
    """Float32 scalars on the device, from this rank's embeddings and predictions, [B, T, D] each.

    one_plus_loss: 1 - mean cosine of prediction and next embedding
    centred_cosine: that cosine after the mean target is taken from both (all l2-normalised first)
    copy_cosine: mean cosine of a patch's embedding and the next one's: what copying the input would reach
    copy_win: share of positions whose prediction is nearer to the current embedding than to the next
    embedding_std: mean over dimensions of the standard deviation of the l2-normalised targets; 0: collapsed
    effective_rank: exp(entropy of the targets' normalised singular values) (RankMe, 2210.02885, equation 2)
    target_cosine: mean cosine between different targets; 1: collapsed
    """
    z = F.normalize(embeddings.float(), dim=-1)
    h = F.normalize(predictions.float(), dim=-1)
    targets, predicted = z[:, 1:], h[:, :-1]
    cosine = (predicted * targets).sum(-1)
    # a copy is only possible from a patch: the first target follows CLS
    copy = (z[:, 1:-1] * z[:, 2:]).sum(-1)
    nearer_to_current = (h[:, 1:-1] * z[:, 1:-1]).sum(-1) > cosine[:, 1:]
    mean = targets.mean((0, 1))
    return {
        "one_plus_loss": 1.0 - cosine.mean(),
        "centred_cosine": F.cosine_similarity(predicted - mean, targets - mean, dim=-1).mean(),
        "copy_cosine": copy.mean(),
        "copy_win": nearer_to_current.float().mean(),
        **target_diagnostics(targets),
    }


@torch.no_grad()
def target_diagnostics(targets: Tensor) -> dict[str, Tensor]:
    """The last three of `collapse_diagnostics`, of targets [B, n, D]."""
    flat = F.normalize(targets.float(), dim=-1).flatten(0, 1)
    mean = flat.mean(0)
    count = flat.shape[0]
    return {
        "embedding_std": flat.std(0, unbiased=False).mean(),
        "effective_rank": effective_rank(flat[_spectrum_rows(count, flat.device)]),
        "target_cosine": (count * mean.square().sum() - 1.0) / (count - 1),
    }


def _spectrum_rows(count: int, device: torch.device) -> Tensor:
    """Which of `count` targets the effective rank is taken of: always the same ones.

    Not every k-th: a k that the grid's width divides would take the patches of one column only.
    """
    return uniform(torch.arange(count, device=device), "spectrum").squeeze(1).argsort()[:SPECTRUM_ROWS]


def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of `rows` [N, D]; between 1 and min(N, D), NaN if any row is."""
    values = torch.linalg.svdvals(rows.float().nan_to_num())  # which refuses what is not finite
    p = values / values.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.exp(-(p * p.clamp_min(1e-12).log()).sum())
    return torch.where(rows.isfinite().all(), rank, torch.nan)
