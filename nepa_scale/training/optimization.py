"""Which parameters decay, and the groups that pretraining has of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nepa_scale.sharding.strategy import ParameterGroup


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, patch embedding, CLS and mask token; not to biases, norms, LayerScale.

    By name, since under ZeRO-3 every parameter is one-dimensional.
    """
    owner, _, kind = name.rpartition(".")
    return kind not in ("bias", "attention_scale", "mlp_scale") and not owner.endswith("norm")


def pretraining_groups(
    names: Sequence[str],
    weight_decay: float,
    rate_of: Callable[[str], float] | None = None,
    weight_decay_end: float | None = None,
) -> list[ParameterGroup]:
    """Parameters that decay and that do not, those of each learning rate together.

    rate_of: factor on the learning rate of a parameter; None: 1. What weight decay takes off in a step does not depend
        on it: AdamW multiplies the two, so that the decay is divided by it.
    weight_decay_end: what the decay is to become over the run; None: it stays
    """
    members: dict[tuple[bool, float], list[str]] = {}
    for name in sorted(names, key=decays, reverse=True):
        factor = rate_of(name) if rate_of else 1.0
        members.setdefault((decays(name), factor), []).append(name)
    return [
        ParameterGroup(
            tuple(some),
            weight_decay / factor if decaying else 0.0,
            factor,
            label=("decay" if decaying else "no decay") + (f", lr x {factor:.3g}" if factor != 1.0 else ""),
            weight_decay_end=weight_decay_end / factor if decaying and weight_decay_end is not None else None,
        )
        for (decaying, factor), some in members.items()
    ]
