"""The method's original code as the judge: a tiny model's outputs, loss, gradients and first optimiser steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nepa_scale.config import ObjectiveConfig
from nepa_scale.interop import OfficialModel, load_official
from nepa_scale.interop.official import official_names
from nepa_scale.objectives import NextEmbedding
from nepa_scale.training.optimization import pretraining_groups

MODES = ["causal", "bidirectional", "causal_train_rope_rescaled"]
Loader = Callable[[str], OfficialModel]


@pytest.fixture
def load(oracle: dict[str, Any], tmp_path: Path) -> Loader:
    def load_case(case: str) -> OfficialModel:
        (tmp_path / "config.json").write_text(json.dumps(oracle[case]["config"]))
        save_file(oracle[case]["state_dict"], tmp_path / "model.safetensors")
        return load_official(tmp_path)

    return load_case


def official_tensors(model: OfficialModel, of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """What `of` gives for each parameter, by official name: for queries, keys and values a third of ours."""
    parameters = dict(model.task.named_parameters())
    tensors = {}
    for ours, names in official_names(model.task):
        value = of(parameters[ours])
        assert value is not None, ours
        tensors |= dict(zip(names, value.chunk(len(names)), strict=True))
    return tensors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["perturbed", "init"])
def test_outputs_loss_and_gradients(oracle: dict[str, Any], load: Loader, case: str, mode: str) -> None:
    expected = oracle[case][mode]
    model = load(case)
    assert isinstance(model.task, NextEmbedding)
    model.task.objective = ObjectiveConfig(causal=mode != "bidirectional")
    factor = expected.get("rope_rescale")
    out = model(oracle["pixel_values"], rope_scale=None if factor is None else torch.tensor(factor))
    out.loss.backward()

    torch.testing.assert_close(out.predictions, expected["last_hidden_state"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=0, atol=1e-6)
    if "input_embedding" in expected:
        torch.testing.assert_close(out.embeddings, expected["input_embedding"], rtol=0, atol=1e-5)
    if "grads" in expected:
        gradients = official_tensors(model, lambda parameter: parameter.grad)
        assert gradients.keys() == expected["grads"].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected["grads"][name], rtol=0, atol=1e-6)


def test_five_steps_of_adamw(oracle: dict[str, Any], load: Loader) -> None:
    expected = oracle["adamw_trajectory"]
    model = load("init")
    parameters = dict(model.task.named_parameters())
    decayed, kept = pretraining_groups(list(parameters), expected["weight_decay"])
    assert (decayed.weight_decay, kept.weight_decay) == (expected["weight_decay"], 0.0)
    officials = dict(official_names(model.task))
    assert {name for ours in decayed.names for name in officials[ours]} == set(expected["decay_names"])
    assert {name for ours in kept.names for name in officials[ours]} == set(expected["no_decay_names"])
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay}
            for group in (decayed, kept)
        ],
        lr=expected["lr"],
        betas=expected["betas"],
        eps=expected["eps"],
    )
    for loss, norm in zip(expected["losses"], expected["grad_norms"], strict=True):
        out = model(oracle["pixel_values"])
        assert out.loss.item() == pytest.approx(loss, abs=1e-5)
        out.loss.backward()
        total = torch.nn.utils.clip_grad_norm_(parameters.values(), expected["clip"])
        assert total.item() == pytest.approx(norm, abs=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in official_tensors(model, lambda parameter: parameter.detach()).items():
        torch.testing.assert_close(value, expected["final_state_dict"][name], rtol=0, atol=1e-5)
