"""Attentive probe: how well one layer of attention, then a linear classifier, do on tokens that stay as they are.

The mean of the patches is not where a model that predicts has to keep what it knows; a learned query finds it. After
AIM (2401.08541, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.counter_random import uniform
from nepa_scale.data import ShardSet, TrainStream
from nepa_scale.data.batch import Batch, normalize
from nepa_scale.models import CausalViT
from nepa_scale.sharding import World

LEARNING_RATES = (3e-4, 1e-3, 3e-3)  # of AdamW
WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of the steps
BATCH = 256  # of all ranks together, so that their number does not matter
HELD_OUT = 0.1  # of the training images, by which the learning rate is chosen


class AttentiveHead(nn.Module):
    """Tokens [B, T, D] -> logits [B, C]: a learned query attends to them in heads of 64 or 32 dimensions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.heads = next(width // size for size in (64, 32, width) if width % size == 0)
        self.query = nn.Parameter(torch.empty(width))
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.classifier = nn.Linear(width, classes)

    def initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.query, self.key_value.weight):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        query = self.query.expand(len(tokens), 1, -1)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, *self.key_value(tokens).chunk(2, 2))
        )
        pooled: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        return self.classifier(pooled)


class AttentiveProbe:
    """One head for each learning rate, all trained on the same tokens; the best is kept.

    block: whose output is probed, from 0
    """

    def __init__(
        self, backbone: CausalViT, block: int, classes: int, world: World, *, causal: bool = True, seed: int = 0
    ) -> None:
        self.backbone, self.block, self.causal, self.world = backbone, block, causal, world
        self.heads = [AttentiveHead(backbone.architecture.width, classes) for _ in LEARNING_RATES]
        for head in self.heads:
            head.initialize(seed)
            head.to(world.device)
        self.best = 0

    @property
    def lr(self) -> float:
        return LEARNING_RATES[self.best]

    def fit(self, stream: Iterator[Batch], steps: int, epoch_steps: int) -> None:
        """Takes `steps` augmented batches of this rank, the last `epoch_steps` of which choose the head."""
        optimizer = torch.optim.AdamW(
            [
                {"params": list(head.parameters()), "lr": lr}
                for head, lr in zip(self.heads, LEARNING_RATES, strict=True)
            ],
            weight_decay=WEIGHT_DECAY,
        )
        warmup = max(1, round(WARMUP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        held_right = torch.zeros(len(self.heads), device=self.world.device)
        for step, host in enumerate(islice(stream, steps)):
            batch = host.to_device(self.world.device)
            tokens = self._tokens(normalize(batch.images, batch.flip))
            held = uniform(batch.samples, "attentive probe").squeeze(1) < HELD_OUT
            logits = [head(tokens) for head in self.heads]
            self._update(optimizer, logits, batch.labels, ~held)
            schedule.step()
            if step >= steps - epoch_steps:
                held_right += torch.stack([((one.argmax(1) == batch.labels) & held).sum() for one in logits])
        dist.all_reduce(held_right)
        self.best = int(held_right.argmax())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images -> {"logits"} of the best head, as a classifier gives them."""
        return {"logits": self.heads[self.best](self._tokens(images))}

    @torch.no_grad()
    def _tokens(self, images: Tensor) -> Tensor:
        (tokens,) = self.backbone.hidden_states(images, [self.block], causal=self.causal)
        return tokens

    def fit_on(
        self, train: ShardSet, data: DataConfig, epochs: int, shown: Callable[[Iterator[Batch], int], Iterator[Batch]]
    ) -> None:
        """Fits to epochs of a labelled set, shuffled and augmented as `data` says. Collective.

        shown: passes on the batches, of which there are so many, with progress
        Raises:
            ConfigError: the ranks do not divide the batch.
        """
        batch = min(BATCH, 2 ** (len(train).bit_length() - 1))
        if batch % self.world.size:
            raise ConfigError(f"the attentive probe takes batches of {batch}: start a number of ranks that divides it")
        stream = TrainStream(
            train,
            data,
            image_size=self.backbone.architecture.image_size,
            global_batch_size=batch,
            micro_batch_size=batch // self.world.size,
            seed=0,
            rank=self.world.rank,
            world_size=self.world.size,
            classes=train.classes,
        )
        steps = epochs * stream.steps_per_epoch
        try:
            self.fit(shown(iter(stream), steps), steps, stream.steps_per_epoch)
        finally:
            stream.close()

    def _update(self, optimizer: torch.optim.Optimizer, logits: list[Tensor], labels: Tensor, used: Tensor) -> None:
        """One step on the mean over all ranks' used samples, the same for any number of ranks."""
        losses = [F.cross_entropy(one[used], labels[used], reduction="sum") for one in logits]
        torch.stack(losses).sum().backward()
        gradients = [p.grad for head in self.heads for p in head.parameters() if p.grad is not None]
        flat = torch.cat([used.sum().float().view(1), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        flat = flat[1:] / flat[0].clamp_min(1)
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
