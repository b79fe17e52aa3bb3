"""Three other programs' counts of the forward pass, and torch's of the backward pass, to hold the closed form to.

Each is told what it lacks: torch's counter the attention of CPUs, fvcore the attention and that a multiply-add is two
FLOPs. DeepSpeed's profiler counts multiply-adds of the products apart from element-wise work. All run on the meta
device by default, where a 7B model takes no memory. FLOPs are of one image.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nepa_scale.config import ObjectiveConfig
from nepa_scale.models import Architecture, CausalViT, initialize_module
from nepa_scale.objectives import NextEmbedding, build_pretext, needs_teacher
from nepa_scale.sharding.recompute import recompute_units

aten = torch.ops.aten


@dataclass(frozen=True)
class CountedTraining:
    """What torch's counter saw of one image's training, recomputation and fused kernels included."""

    forward: int
    backward: int


def count_all(architecture: Architecture) -> dict[str, dict[str, int]]:
    """Forward FLOPs by module from each counter: `torch`, `fvcore`, `deepspeed`."""
    return {
        "torch": torch_forward(architecture),
        "fvcore": fvcore_forward(architecture),
        "deepspeed": deepspeed_forward(architecture),
    }


def torch_forward(architecture: Architecture, device: str = "meta") -> dict[str, int]:
    """Forward FLOPs by module from `FlopCounterMode`."""
    model, images = _model_and_image(architecture, device)
    with torch.no_grad(), _flop_counter() as counter:
        model(images)
    modules = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return _by_part(lambda name: modules.get(f"CausalViT.{name}", 0), architecture)


def torch_training(
    architecture: Architecture, recompute: str = "none", device: str = "meta", *, drop_path_keys: bool = False
) -> CountedTraining:
    """Forward and backward FLOPs of next_embedding's step from `FlopCounterMode`, recomputing as training does.

    drop_path_keys: give the step the sample keys from which drop path is drawn
    """
    with torch.device(device):
        task = NextEmbedding(CausalViT(architecture), ObjectiveConfig())
        keys = torch.zeros(1, dtype=torch.int64) if drop_path_keys else None
    if device != "meta":
        initialize_module(task, architecture, seed=0)
    recompute_units(task.train(), recompute)
    images = torch.zeros(1, 3, *architecture.image_size, device=device)
    with _flop_counter() as counter:
        # the objective by hand: it has no products, and its autocast does not know the meta device
        embeddings, predictions = task.backbone(images, sample_keys=keys)
        loss = -F.cosine_similarity(predictions[:, :-1], embeddings[:, 1:].detach(), dim=-1).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return CountedTraining(forward, counter.get_total_flops() - forward)


def torch_pretext(
    architecture: Architecture, objective: ObjectiveConfig, recompute: str = "none", device: str = "meta"
) -> CountedTraining:
    """The same of the step of mae or jepa, the module's own forward pass and its teacher's."""
    with torch.device(device):
        task = build_pretext(CausalViT(architecture), objective)
        keys = torch.zeros(1, dtype=torch.int64)
    if device != "meta":
        initialize_module(task, architecture, seed=0)
    recompute_units(task.train(), recompute)
    images = torch.zeros(1, 3, *architecture.image_size, device=device)
    inputs = {"images": images, "sample_keys": keys}
    with _flop_counter() as counter:
        if needs_teacher(objective):
            with torch.no_grad():
                inputs["taught"] = task(images)["predictions"]
        loss = task(**inputs)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    return CountedTraining(forward, counter.get_total_flops() - forward)


def fvcore_forward(architecture: Architecture, device: str = "meta") -> dict[str, int]:
    """Forward FLOPs by module from fvcore, with our handler for attention and its multiply-adds doubled."""
    from fvcore.nn import FlopCountAnalysis

    model, images = _model_and_image(architecture, device)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        analysis = FlopCountAnalysis(model, images)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_multiply_adds)
        analysis.set_op_handle("aten::layer_norm", _nothing)  # None would leave its own count
        modules = analysis.by_module()
    return _by_part(lambda name: 2 * int(modules[name]), architecture)


def deepspeed_forward(architecture: Architecture, device: str = "meta") -> dict[str, int]:
    """Forward FLOPs by module from DeepSpeed's profiler: twice its multiply-adds.

    It replaces functions of torch. Those of the meta device are written with each other (a linear is an addmm), so that
    it would count a product twice: there only `torch.nn.functional` stays replaced, which is what the model calls.
    """
    with contextlib.redirect_stdout(sys.stderr):  # to which its logger, made at the first import, then holds on
        from deepspeed.profiling.flops_profiler import FlopsProfiler
        from deepspeed.profiling.flops_profiler import profiler as internals

    model, images = _model_and_image(architecture, device)
    profiler = FlopsProfiler(model)
    with torch.no_grad():
        profiler.start_profile()
        if device == "meta":
            internals._reload_tensor_methods()
        model(images)
        profiler.stop_profile()
    modules = {name: sum(int(part.__macs__) for part in module.modules()) for name, module in model.named_modules()}
    profiler.end_profile()
    return _by_part(lambda name: 2 * modules[name], architecture)


_ELEMENTWISE = {"mul": 1, "add": 1, "sqrt": 1, "div": 1, "lerp": 3, "addcmul": 3, "addcdiv": 3}


class ElementwiseCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the element-wise operations of an optimiser's step, an operation an element."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operations = _ELEMENTWISE.get(function.overloadpacket.__name__.rstrip("_"), 0)
        if operations and isinstance(result, Tensor) and result.ndim > 0:
            self.total += operations * result.numel()
        return result


def _model_and_image(architecture: Architecture, device: str) -> tuple[CausalViT, Tensor]:
    with torch.device(device):
        model = CausalViT(architecture).eval()
        images = torch.zeros(1, 3, *architecture.image_size)
    if device != "meta":
        initialize_module(model, architecture, seed=0)
    return model, images


def _by_part(module_flops: Callable[[str], int], architecture: Architecture) -> dict[str, int]:
    """The parts of `flops.PARTS` from the counts of named modules; what attention has beyond its products is scores."""
    blocks = [f"blocks.{index}" for index in range(architecture.depth)]

    def total(name: str) -> int:
        return sum(module_flops(f"{block}.{name}") for block in blocks)

    qkv, out = total("attention.qkv"), total("attention.out")
    return {
        "embedding": module_flops("embedding"),
        "qkv": qkv,
        "scores": total("attention") - qkv - out,
        "out": out,
        "mlp": total("mlp"),
    }


def _flop_counter() -> FlopCounterMode:
    """With formulas for the attention of CPUs, which torch's own table lacks."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
        },
    )


def _cpu_attention(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _nothing(_inputs: list[Any], _outputs: list[Any]) -> int:
    return 0


def _attention_multiply_adds(inputs: list[Any], _outputs: list[Any]) -> int:
    query, key, value = (value.type().sizes() for value in inputs[:3])
    return int(sdpa_flop_count(query, key, value)) // 2
