"""The sizes from tiny to 7B, and the architecture that a configuration resolves to."""

from __future__ import annotations

from dataclasses import dataclass

from nepa_scale.config import ConfigError, ModelConfig, nearest


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and MLP width of a named size, and where the numbers come from."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    source: str


SIZES: dict[str, Size] = {
    "vit_ti": Size(192, 12, 3, 768, "DeiT-Ti, 2012.12877, table 1"),
    "vit_s": Size(384, 12, 6, 1536, "DeiT-S, 2012.12877, table 1"),
    "vit_b": Size(768, 12, 12, 3072, "ViT-Base, 2010.11929, table 1; NEPA-B"),
    "vit_l": Size(1024, 24, 16, 4096, "ViT-Large, 2010.11929, table 1; NEPA-L"),
    "vit_h": Size(1280, 32, 16, 5120, "ViT-Huge, 2010.11929, table 1"),
    "vit_g": Size(1408, 40, 16, 6144, "ViT-g, 2106.04560, table 2"),
    "vit_1b": Size(2048, 24, 16, 8192, "AIM-1B, 2401.08541, table 1"),
    "vit_3b": Size(3072, 24, 24, 12288, "AIM-3B, 2401.08541, table 1"),
    "vit_7b": Size(4096, 32, 32, 16384, "AIM-7B, 2401.08541, table 1"),
}


@dataclass(frozen=True)
class Architecture:
    """A fully determined backbone; every field has its final value."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    gated: bool
    patch_size: int
    image_size: tuple[int, int]  # height, width
    rope: bool
    rope_theta: float
    rope_rescale: float
    qk_norm: str
    layer_scale: float | None
    drop_path: float
    init_std: float
    mask_token: bool
    base_width: int | None = None
    base_depth: int | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Sequence length: the CLS token and the patches."""
        return 1 + self.grid[0] * self.grid[1]


def resolve_architecture(model: ModelConfig, mask_token: bool = False) -> Architecture:
    """`model` with its size looked up and its explicit fields applied.

    Raises:
        ConfigError: unknown size, or numbers that do not fit together; the message says which would.
    """
    if model.size not in SIZES:
        raise ConfigError(
            f"unknown model.size={model.size}{nearest(model.size, list(SIZES))}; sizes: {', '.join(SIZES)}"
        )
    size = SIZES[model.size]
    width = model.width if model.width is not None else size.width
    mlp_width = size.mlp_width if model.width is None else 4 * width  # an explicit width takes the customary 4x along
    architecture = Architecture(
        width=width,
        depth=model.depth if model.depth is not None else size.depth,
        heads=model.heads if model.heads is not None else size.heads,
        mlp_width=model.mlp_width if model.mlp_width is not None else mlp_width,
        gated=model.mlp == "swiglu",
        patch_size=model.patch_size,
        image_size=_height_width(model.image_size),
        rope=model.rope,
        rope_theta=model.rope_theta,
        rope_rescale=model.rope_rescale,
        qk_norm=model.qk_norm,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        init_std=model.init_std,
        mask_token=mask_token,
        base_width=model.base_width,
        base_depth=model.base_depth,
    )
    _check(architecture)
    return architecture


def size_name(architecture: Architecture) -> str:
    """The named size whose width, depth, heads and MLP width these are; these themselves where it is none of them."""
    a = architecture
    for name, size in SIZES.items():
        if (size.width, size.depth, size.heads, size.mlp_width) == (a.width, a.depth, a.heads, a.mlp_width):
            return name
    own = f"width {a.width} x depth {a.depth} x heads {a.heads}"
    return own if a.mlp_width == 4 * a.width else f"{own} x MLP {a.mlp_width}"


def _height_width(image_size: int | list[int]) -> tuple[int, int]:
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2:
        raise ConfigError(f"model.image_size={image_size} must be one side, or [height, width]")
    return sides[0], sides[1]


def _check(architecture: Architecture) -> None:
    for name in ("width", "depth", "heads", "mlp_width"):
        if getattr(architecture, name) < 1:
            raise ConfigError(f"model.{name}={getattr(architecture, name)} must be at least 1")
    if architecture.width % architecture.heads:
        raise ConfigError(
            f"model.width={architecture.width} does not divide into model.heads={architecture.heads}; "
            f"heads that do: {', '.join(str(h) for h in range(1, 129) if architecture.width % h == 0)}"
        )
    if architecture.rope and architecture.head_dim % 4:
        raise ConfigError(
            f"rotary position needs a head width that 4 divides; width {architecture.width} over "
            f"{architecture.heads} heads is {architecture.head_dim}: change model.width or model.heads, or set "
            "model.rope=false"
        )
    for side in architecture.image_size:
        patch = architecture.patch_size
        if side < patch or side % patch:
            lower, upper = max(side // patch, 1) * patch, (side // patch + 1) * patch
            raise ConfigError(
                f"model.image_size={side} is not a multiple of model.patch_size={patch}; "
                f"nearest that are: {lower}, {upper}"
            )
