"""What an image goes through in a step of each objective: passes through stacks of blocks, of so many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import Architecture
from nepa_scale.objectives.blocks import TARGETS, blocks_of
from nepa_scale.objectives.jepa import jepa_predictor
from nepa_scale.objectives.mae import hidden_patches, mae_decoder

BACKBONE = "backbone"  # the pass of the model that is trained to be kept


@dataclass(frozen=True)
class Pass:
    """One pass of an image.

    name: BACKBONE, "decoder", "predictor" or "teacher"
    tokens: of a sequence; sequences: of the image
    embeds: whether it begins with the image's patches, all of them
    linears: (rows, inputs, outputs) of an image's linear layers outside of the blocks
    trained: whether a backward pass follows
    """

    name: str
    architecture: Architecture
    tokens: int
    sequences: int = 1
    embeds: bool = True
    linears: tuple[tuple[int, int, int], ...] = ()
    trained: bool = True


def passes_of(architecture: Architecture, objective: ObjectiveConfig | None = None) -> Iterator[Pass]:
    """The passes of one image's training, that of the backbone first; None: next_embedding's.

    Raises:
        ConfigError: the objective cannot work on this backbone.
    """
    a = architecture
    if objective is None or objective.name == "next_embedding":
        yield Pass(BACKBONE, a, a.tokens)
    elif objective.name == "mae":
        own, hidden = mae_decoder(a, objective), hidden_patches(a, objective)
        seen = a.tokens - hidden
        ends = ((seen, a.width, own.width), (hidden, own.width, 3 * a.patch_size**2))
        yield Pass(BACKBONE, a, seen)
        yield Pass("decoder", own, a.tokens, embeds=False, linears=ends)
    else:
        own, layout = jepa_predictor(a, objective), blocks_of(a.grid)
        seen, told = 1 + layout.context_patches, layout.target_patches
        ends = ((seen, a.width, own.width), (TARGETS * told, own.width, a.width))
        yield Pass(BACKBONE, a, seen)
        yield Pass("predictor", own, seen + told, sequences=TARGETS, embeds=False, linears=ends)
        yield Pass("teacher", a, a.tokens, trained=False)


def backbone_forwards(architecture: Architecture, objective: ObjectiveConfig | None = None) -> int:
    """Forward passes through the backbone's blocks in a step, whatever the tokens."""
    return sum(1 for one in passes_of(architecture, objective) if one.embeds)
