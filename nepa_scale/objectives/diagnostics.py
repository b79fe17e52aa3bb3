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
_EPS = 1e-8  # as in F.cosine_similarity


@torch.no_grad()
def collapse_diagnostics(embeddings: Tensor, predictions: Tensor, *, spectrum: bool = True) -> dict[str, Tensor]:
    """Float32 scalars on the device, from this rank's embeddings and predictions of a micro-batch, [B, T, D] each.

    one_plus_loss: 1 - mean cosine of prediction and next embedding
    centred_cosine: that cosine after the mean target is taken from both (all l2-normalised first)
    copy_cosine: mean cosine of a patch's embedding and the next one's: what copying the input would reach
    copy_win: share of positions whose prediction is nearer to the current embedding than to the next
    embedding_std: mean over dimensions of the standard deviation of the l2-normalised targets; 0: collapsed
    effective_rank: exp(entropy of the targets' normalised singular values) (RankMe, 2210.02885, equation 2); only with
        `spectrum`: it costs as much as all others, and on a GPU a wait for the device
    target_cosine: mean cosine between different targets; 1: collapsed
    """
    z, h = _directions(embeddings), _directions(predictions)
    targets, predicted = z[:, 1:], h[:, :-1]
    cosine = _dot(predicted, targets)
    # a copy is only possible from a patch: the first target follows CLS
    nearer_to_current = _dot(h[:, 1:-1], z[:, 1:-1]) > cosine[:, 1:]
    mean = targets.mean((0, 1))
    centred = targets - mean
    return {
        "one_plus_loss": 1.0 - cosine.mean(),
        "centred_cosine": _cosine(predicted - mean, centred).mean(),
        "copy_cosine": _dot(z[:, 1:-1], z[:, 2:]).mean(),
        "copy_win": nearer_to_current.float().mean(),
        **_of_targets(targets, mean, centred, spectrum),
    }


@torch.no_grad()
def target_diagnostics(targets: Tensor, *, spectrum: bool = True) -> dict[str, Tensor]:
    """The last three of `collapse_diagnostics`, of targets [B, n, D]."""
    z = _directions(targets)
    mean = z.mean((0, 1))
    return _of_targets(z, mean, z - mean, spectrum)


def _of_targets(targets: Tensor, mean: Tensor, centred: Tensor, spectrum: bool) -> dict[str, Tensor]:
    """targets: l2-normalised; centred: around their mean, and overwritten."""
    count = targets[..., 0].numel()
    found = {
        "embedding_std": centred.square_().mean((0, 1)).sqrt_().mean(),
        "target_cosine": (count * mean.square().sum() - 1.0) / (count - 1),
    }
    return found | ({"effective_rank": effective_rank(spectrum_sample(targets))} if spectrum else {})


def _directions(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Over the last dimension: F.cosine_similarity, which on a CPU takes ten times as long."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return _dot(a, b) / norms.clamp_min(_EPS)


@torch.no_grad()
def spectrum_sample(targets: Tensor) -> Tensor:
    """At most `SPECTRUM_ROWS` of the targets [B, n, D], always the same ones, l2-normalised: float32 [rows, D]."""
    flat = targets.flatten(0, 1)
    return _directions(flat[_spectrum_rows(flat.shape[0], flat.device)])


def _spectrum_rows(count: int, device: torch.device) -> Tensor:
    """Which of `count` targets the effective rank is taken of: always the same ones.

    Not every k-th: a k that the grid's width divides would take the patches of one column only.
    """
    return uniform(torch.arange(count, device=device), "spectrum").squeeze(1).argsort()[:SPECTRUM_ROWS]


def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of `rows` [..., N, D], float32 [...].

    Between 1 and min(N, D); NaN where any row is. The singular values are the roots of the Gram matrix's eigenvalues:
    in float64 these are exact enough, and take half the time of a decomposition of the rows.
    """
    x = rows.double().nan_to_num()  # the decomposition refuses what is not finite
    gram = x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    p = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.exp(-(p * p.clamp_min(1e-12).log()).sum(-1))
    return torch.where(rows.isfinite().all(-1).all(-1), rank, torch.nan).float()
