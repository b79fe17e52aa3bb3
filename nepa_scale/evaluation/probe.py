"""Linear probe: how well a linear classifier does on features that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nepa_scale.config import ConfigError

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # of AdamW on standardised features
HELD_OUT = 0.1  # of the training features, by which the learning rate is chosen


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    weight, bias: float32 [C, D] and [C], on features standardised by `mean` and `scale` [D]
    lr: the learning rate that did best on the training features held out
    held_out: the accuracy on these, 0..1
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    lr: float
    held_out: float

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C]."""
        return ((features.float() - self.mean) / self.scale) @ self.weight.T + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """`top1` and `top5`, 0..1, of features [N, D] and labels [N]."""
        first = self.logits(features).topk(min(5, len(self.bias)), dim=1).indices == labels[:, None]
        return {"top1": first[:, 0].float().mean().item(), "top5": first.any(1).float().mean().item()}


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int = 50,
    batch_size: int = 1024,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> LinearProbe:
    """Softmax regression by AdamW with cosine decay, all learning rates of the grid at once; the best is kept.

    features: float [N, D]; labels: int64 [N], 0..classes-1; on the same device, where the work is done in float32
    Raises:
        ConfigError: fewer than two samples, or a label out of range.
    """
    if len(labels) < 2 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ConfigError(f"a linear probe needs samples with labels 0..{classes - 1}")
    mean, scale = features.float().mean(0), features.float().std(0).clamp_min(1e-6)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held, used = order[: max(1, int(HELD_OUT * len(labels)))], order[max(1, int(HELD_OUT * len(labels))) :]
    weight, bias = _fit_grid(features, labels, used, mean, scale, classes, epochs, batch_size, weight_decay, seed)
    logits = torch.einsum("nd,gcd->gnc", (features[held].float() - mean) / scale, weight) + bias[:, None]
    right = (logits.argmax(-1) == labels[held]).float().mean(1)
    losses = torch.stack([F.cross_entropy(one, labels[held]) for one in logits])
    best = int((right - 1e-3 * losses.clamp(max=100.0)).argmax())  # the loss decides between equal accuracies
    return LinearProbe(weight[best], bias[best], mean, scale, LEARNING_RATES[best], right[best].item())


def _fit_grid(
    features: Tensor,
    labels: Tensor,
    used: Tensor,
    mean: Tensor,
    scale: Tensor,
    classes: int,
    epochs: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Weights [G, C, D] and biases [G, C] of all learning rates, trained side by side on rows `used`."""
    grid = len(LEARNING_RATES)
    weight = torch.zeros(grid, classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(grid, classes, device=features.device, requires_grad=True)
    rates = torch.tensor(LEARNING_RATES, device=features.device)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)}
    generator = torch.Generator().manual_seed(seed + 1)
    batches = -(-len(used) // batch_size)
    for step in range(epochs * batches):
        if step % batches == 0:
            order = used[torch.randperm(len(used), generator=generator).to(used.device)]
        rows = order[step % batches * batch_size :][:batch_size]
        x = (features[rows].float() - mean) / scale
        logits = torch.einsum("nd,gcd->gnc", x, weight) + bias[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(grid), reduction="sum") / len(rows)
        loss.backward()
        lr = rates * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / (epochs * batches))))
        for parameter, (first, second) in moments.items():
            _adamw(parameter, first, second, lr, step + 1, weight_decay if parameter is weight else 0.0)
    return weight.detach(), bias.detach()


@torch.no_grad()
def _adamw(parameter: Tensor, first: Tensor, second: Tensor, lr: Tensor, step: int, weight_decay: float) -> None:
    """One AdamW step with a learning rate for each entry of the first dimension, which torch's does not offer."""
    assert parameter.grad is not None
    lr = lr.view(-1, *[1] * (parameter.dim() - 1))
    first.lerp_(parameter.grad, 0.1)
    second.lerp_(parameter.grad.square(), 0.001)
    parameter.mul_(1 - lr * weight_decay)
    parameter.sub_(lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    parameter.grad = None
