"""Attention by rows: equal to full attention and to what the model does; distance and entropy against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_scale.analysis.attention import AttentionSurvey, attention_rows, row_measures, uniform_rows
from nepa_scale.analysis.queries import sampled_patches
from nepa_scale.models.rope import rope_tables
from tests.models.test_against_reference import build

SIZE, GRID = (12, 20), (3, 5)  # of the images, in pixels and patches of 4: not square, and not the model's own
TOKENS = torch.tensor([0, 1, 7, 15])


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def full_attention(attention: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None, causal: bool) -> Tensor:
    """The whole matrix [B, H, T, T], in the plainest way."""
    q, k, _ = attention.queries_keys_values(x, rope)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * attention.head_dim**-0.5
    if causal:
        scores += torch.full_like(scores, -math.inf).triu(1)
    return scores.softmax(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model", [{"qk_norm": "none"}, {"qk_norm": "plain"}, {"qk_norm": "affine"}, {"rope": False}])
@torch.no_grad()
def test_rows_are_those_of_the_full_matrix(model: dict[str, Any], causal: bool) -> None:
    backbone = build(**model)
    a = backbone.architecture
    rope = rope_tables(GRID, a.head_dim, a.rope_theta, torch.device("cpu")) if a.rope else None
    found = attention_rows(backbone, images(), TOKENS, causal=causal)
    assert len(found) == a.depth
    x = backbone.embedding(images(), torch.float32)
    for block, rows in zip(backbone.blocks, found, strict=True):
        full = full_attention(block.attention, block.attention_norm(x), rope, causal)
        torch.testing.assert_close(rows, full[:, :, TOKENS], rtol=0, atol=1e-5)
        assert not causal or rows[:, :, 1, 2:].abs().max() == 0
        x = block(x, rope, causal, torch.float32, None)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_rows_times_values_are_the_layers_output(causal: bool) -> None:
    backbone = build(qk_norm="affine")
    seen: list[tuple[Tensor, Tensor]] = []  # values and output of each layer, as the model runs

    def watch(attention: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.append((attention.queries_keys_values(inputs[0], inputs[1])[2], output))

    for block in backbone.blocks:
        block.attention.register_forward_hook(watch)
    found = attention_rows(backbone, images(), TOKENS, causal=causal)
    for block, rows, (values, output) in zip(backbone.blocks, found, seen, strict=True):
        mixed = (rows @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attention.out(mixed), output[:, TOKENS], rtol=0, atol=1e-5)


def test_the_matrix_is_never_formed_and_nothing_is_left_behind() -> None:
    backbone = build()
    many = torch.randn(1, 3, 128, 128)  # 1025 tokens
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple) else (out,):
                if isinstance(one, Tensor):
                    largest = max(largest, one.numel())
            return out

    with Sizes():
        rows = attention_rows(backbone, many, TOKENS, causal=True)
    assert rows[0].shape == (1, 2, 4, 1025)
    assert largest < 1025 * 1025 / 5
    assert not any(block.attention._forward_pre_hooks for block in backbone.blocks)


def test_distance_of_known_rows() -> None:
    rows = torch.zeros(3, 16)
    rows[0, 0], rows[0, 1 + 14] = 0.5, 0.5  # half on CLS, half from patch (0, 1) to (2, 4)
    rows[1, 1 + 6] = 1.0  # from (1, 1) to itself
    rows[2, 1 + 0], rows[2, 1 + 4] = 0.25, 0.75  # from (0, 2) two to the left and two to the right
    found = row_measures(rows, torch.tensor([1, 6, 2]) + 1, GRID)
    assert found["distance_patches"].tolist() == pytest.approx([math.sqrt(13), 0.0, 2.0])
    assert found["distance_diagonal"].tolist() == pytest.approx([math.sqrt(13 / 34), 0.0, 2 / math.sqrt(34)])
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found["entropy_nats"].tolist() == pytest.approx([math.log(2), 0.0, quarter], abs=1e-6)
    assert found["cls_share"].tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("patches", [2, 9, 40])
def test_uniform_attention_has_closed_forms(patches: int) -> None:
    """In one row of n patches, patch t sees patches 0..t: mean distance t / 2, entropy ln(t + 2) with CLS."""
    numbers = torch.arange(patches)
    tokens = numbers + 1
    causal = row_measures(uniform_rows(tokens, patches + 1, causal=True), tokens, (1, patches))
    torch.testing.assert_close(causal["distance_patches"], numbers / 2)
    torch.testing.assert_close(causal["entropy_nats"], (numbers + 2.0).log())
    both = row_measures(uniform_rows(tokens, patches + 1, causal=False), tokens, (1, patches))
    left, right = numbers * (numbers + 1) / 2, (patches - 1 - numbers) * (patches - numbers) / 2
    torch.testing.assert_close(both["distance_patches"], (left + right) / patches)
    torch.testing.assert_close(both["entropy_nats"], torch.full((patches,), math.log(patches + 1)))


def test_a_survey_of_uniform_attention_has_ratios_of_one_and_weighs_queries_alike() -> None:
    survey = AttentionSurvey()
    distances = []
    for image, (grid, asked) in enumerate([((3, 5), 4), ((6, 2), 7)]):
        tokens = sampled_patches(asked, grid[0] * grid[1], image) + 1
        uniform = uniform_rows(tokens, grid[0] * grid[1] + 1, causal=True)
        distances.append(row_measures(uniform, tokens, grid)["distance_patches"])
        survey.add([uniform.expand(1, 2, -1, -1)] * 3, tokens, grid, causal=True)
    facts = survey.facts()
    assert facts["queries"] == 11
    assert [layer["layer"] for layer in facts["layers"]] == [1, 2, 3]
    for layer in facts["layers"]:
        assert layer["distance_ratio"] == pytest.approx([1.0, 1.0])
        assert layer["entropy_ratio"] == pytest.approx([1.0, 1.0])
    assert facts["uniform"]["distance_patches"] == pytest.approx(float(torch.cat(distances).mean()))


def test_sampled_patches_differ_between_images_and_not_between_calls() -> None:
    assert torch.equal(sampled_patches(5, 100, 3), sampled_patches(5, 100, 3))
    assert not torch.equal(sampled_patches(5, 100, 3), sampled_patches(5, 100, 4))
    assert sampled_patches(50, 9, 0).tolist() == list(range(9))
