"""The causal Vision Transformer and nothing else."""

from nepa_scale.models.initialization import initial_values, initialize_module
from nepa_scale.models.sizes import SIZES, Architecture, resolve_architecture, size_name
from nepa_scale.models.vit import CausalViT, build_vit

__all__ = [
    "SIZES",
    "Architecture",
    "CausalViT",
    "build_vit",
    "initial_values",
    "initialize_module",
    "resolve_architecture",
    "size_name",
]
