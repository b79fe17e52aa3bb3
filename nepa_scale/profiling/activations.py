"""What autograd keeps of a block for its backward pass, in bytes: read off the operators of `nepa_scale.models.layers`.

A test holds these formulas to autograd's own hooks, to the byte. B images, T tokens, D width, M MLP width. Elements of
the matrix products take 4 bytes in fp32 and 2 in bf16, those of the residual stream and the norms always 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from nepa_scale.models import Architecture

FLOAT = 4


@dataclass(frozen=True)
class Shape:
    """Of the activations: an architecture, a micro-batch and a precision.

    cast: whether weights are cast where they are used (bf16 with fp32 parameters: one process, DDP), and so kept twice
    """

    architecture: Architecture
    micro_batch: int
    precision: str
    cast: bool

    @property
    def low(self) -> bool:
        return self.precision == "bf16"

    @property
    def element(self) -> int:
        return 2 if self.low else FLOAT

    @property
    def rows(self) -> int:
        """B x T."""
        return self.micro_batch * self.architecture.tokens

    @property
    def residual(self) -> int:
        """Bytes of one residual stream."""
        return self.rows * self.architecture.width * FLOAT

    @property
    def stream(self) -> int:
        """Bytes of [B, T, D] in the dtype of the products."""
        return self.rows * self.architecture.width * self.element

    @property
    def hidden(self) -> int:
        """Bytes of [B, T, M] in the dtype of the products."""
        return self.rows * self.architecture.mlp_width * self.element


def block_activations(shape: Shape) -> dict[str, int]:
    """Bytes that one block keeps without recomputation, its input included, by kind."""
    a, rows = shape.architecture, shape.rows
    norms = 2 * rows * 2 * FLOAT  # mean and 1/deviation of both norms
    floats = 0  # small vectors that bf16 turns into fp32 ones
    if shape.low:
        floats += a.width * FLOAT * (4 if a.layer_scale is None else 6)
    attention = 3 * shape.stream  # queries, keys, values: one tensor, which the attention keeps for the values
    if a.qk_norm != "none":
        norms += 2 * rows * a.heads * 2 * FLOAT
        attention += 2 * shape.residual if shape.low else 0  # queries and keys in fp32
        floats += 2 * a.head_dim * FLOAT if shape.low and a.qk_norm == "affine" else 0
    if a.rope or a.qk_norm != "none":
        attention += 2 * shape.stream  # queries and keys as attended with
    attention += shape.stream + rows * a.heads * FLOAT  # the result, and the log of the sums
    kinds = {
        "residual": 2 * shape.residual,
        "norms": 2 * shape.stream + norms + floats,
        "attention": attention,
        "mlp": (4 if a.gated else 2) * shape.hidden,
        "branches": 0 if a.layer_scale is None else 2 * shape.stream,
    }
    if shape.cast and shape.low:
        kinds["cast_weights"] = 2 * product_weights(a)
    return kinds


def product_weights(architecture: Architecture) -> int:
    """Elements of the weights of one block's linear layers."""
    a = architecture
    return 4 * a.width * a.width + (3 if a.gated else 2) * a.width * a.mlp_width


def selective_activations(shape: Shape) -> dict[str, int]:
    """Bytes that one block keeps under selective recomputation: its input, results of attention and products.

    Those of square weights are redone: the attention's output, and an MLP as wide as the stream.
    """
    a = shape.architecture
    lse = shape.rows * a.heads * FLOAT
    return {
        "residual": shape.residual,
        "attention": (3 + 1) * shape.stream + lse,
        "mlp": 0 if a.mlp_width == a.width else (2 if a.gated else 1) * shape.hidden + shape.stream,
    }


def full_activations(shape: Shape) -> dict[str, int]:
    """Bytes that one block keeps under full recomputation: its input."""
    return {"residual": shape.residual}


def ends_activations(shape: Shape) -> dict[str, int]:
    """Bytes kept outside of the blocks: what the embedding, the final norm, the rotary tables and the loss keep.

    The embedding's images are not among them: in fp32 they are the step's own input.
    """
    a = shape.architecture
    patches = shape.micro_batch * (a.tokens - 1)
    stored = {"ends": shape.residual + 2 * shape.rows * FLOAT}  # the final norm's input and statistics
    if shape.low:
        stored["loss"] = 2 * shape.stream  # predictions and embeddings; then the norm's and images' and weights' casts
        stored["ends"] += shape.micro_batch * 3 * a.image_size[0] * a.image_size[1] * 2 + 2 * a.width * FLOAT
        if shape.cast:
            stored["cast_weights"] = 2 * a.width * 3 * a.patch_size**2
    else:
        stored["loss"] = shape.stream + patches * a.width * FLOAT + 2 * patches * FLOAT
    if a.rope:
        stored["ends"] += 2 * a.tokens * a.head_dim * FLOAT
    return stored
