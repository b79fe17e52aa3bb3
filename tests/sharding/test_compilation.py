"""Where units are compiled, that they share their graphs, and that training keeps to those of its first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nepa_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, initialize_module, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding import choose_compilation
from nepa_scale.sharding.compilation import _trouble, compile_units

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def broken(_function: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation.\nMore on that: ...")

    _trouble.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    yield
    _trouble.cache_clear()


def test_by_default_gpus_compile_and_hosts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nepa_scale.sharding.compilation._trouble", lambda _device: "")
    with torch._dynamo.config.patch(suppress_errors=False):
        assert choose_compilation(None, CPU) == (False, "")
        assert not torch._dynamo.config.suppress_errors
        assert choose_compilation(None, GPU) == (True, "")
        assert torch._dynamo.config.suppress_errors  # what does not compile runs as it is
    assert choose_compilation(False, GPU) == (False, "")
    assert choose_compilation(True, CPU) == (True, "")


@pytest.mark.usefixtures("broken_compiler")
def test_a_compiler_that_does_not_work_is_named() -> None:
    assert choose_compilation(None, GPU) == (False, "RuntimeError: Cannot find a working triton installation.")
    with pytest.raises(ConfigError, match=r"compile=true, but .*: RuntimeError: Cannot find a working triton"):
        choose_compilation(True, CPU)
    assert choose_compilation(None, CPU) == (False, "")  # nobody asked


@pytest.mark.slow
def test_blocks_share_their_graphs_and_training_keeps_to_them() -> None:
    torch._dynamo.reset()
    model = ModelConfig(width=32, depth=10, heads=2, patch_size=8, image_size=32, drop_path=0.3)
    task = NextEmbedding(CausalViT(resolve_architecture(model)), ObjectiveConfig()).train()
    initialize_module(task, task.backbone.architecture, 0)
    compile_units(task, True)
    counters.clear()

    def step(number: int) -> int:
        task.train()
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        keys = torch.arange(4) + 4 * number
        task(images, sample_keys=keys, rope_scale=torch.full((), 1.0 + 0.1 * number))["loss"].backward()
        return int(counters["stats"]["unique_graphs"])

    assert step(0) == 3  # the embedding, the first block, which has no drop path, and the others
    assert [step(number) for number in range(1, 4)] == [3, 3, 3]
    with torch.no_grad():
        task.eval()
        for count in (4, 3, 2, 1):
            task(torch.zeros(count, 3, 32, 32))
    evaluated = int(counters["stats"]["unique_graphs"])
    assert [step(number) for number in range(4, 6)] == [evaluated, evaluated]
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_memory_budget_is_kept_to_and_changes_no_gradient() -> None:
    model = ModelConfig(width=64, depth=4, heads=2, patch_size=4, image_size=32)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(budget: float | None) -> tuple[int, list[Tensor]]:
        task = NextEmbedding(CausalViT(resolve_architecture(model)), ObjectiveConfig()).train()
        initialize_module(task, task.backbone.architecture, 0)
        compile_units(task, budget is not None, 1.0 if budget is None else budget)
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = task(images)["loss"]
        loss.backward()
        weights = sum(p.untyped_storage().nbytes() for p in task.parameters())
        return sum(kept.values()) - weights, [p.grad for p in task.parameters() if p.grad is not None]

    _, expected = run(None)
    kept = {}
    for budget in (1.0, 0.5, 0.0):
        kept[budget], gradients = run(budget)
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-6)
    assert kept[0.5] < 0.6 * kept[1.0]
    assert kept[0.0] < 0.25 * kept[1.0]
