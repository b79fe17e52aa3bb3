"""The collapse diagnostics against their definitions, pair by pair, and on cases whose answer is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nepa_scale.objectives import collapse_diagnostics, effective_rank, next_embedding_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(embeddings: Tensor, predictions: Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in collapse_diagnostics(embeddings, predictions).items()}


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def by_definition(embeddings: Tensor, predictions: Tensor) -> dict[str, float]:
    z, h = embeddings.double(), predictions.double()
    images, tokens, width = z.shape
    steps = [(b, t) for b in range(images) for t in range(tokens - 1)]
    patches = [(b, t) for b, t in steps if t > 0]
    targets = [z[b, t + 1] / z[b, t + 1].norm() for b, t in steps]
    centre = torch.stack(targets).mean(dim=0)
    singular = torch.linalg.svdvals(torch.stack(targets)).tolist()
    shares = [value / sum(singular) for value in singular]
    deviations = []
    for d in range(width):
        column = [target[d].item() for target in targets]
        deviations.append(math.sqrt(mean([(value - mean(column)) ** 2 for value in column])))
    return {
        "one_plus_loss": 1.0 - mean([cosine(h[b, t], z[b, t + 1]) for b, t in steps]),
        "centred_cosine": mean(
            [
                cosine(h[b, t] / h[b, t].norm() - centre, target - centre)
                for (b, t), target in zip(steps, targets, strict=True)
            ]
        ),
        "copy_cosine": mean([cosine(z[b, t], z[b, t + 1]) for b, t in patches]),
        "copy_win": mean([float(cosine(h[b, t], z[b, t]) > cosine(h[b, t], z[b, t + 1])) for b, t in patches]),
        "embedding_std": mean(deviations),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares if p > 0)),
        "target_cosine": mean([cosine(a, b) for a, b in itertools.combinations(targets, 2)]),
    }


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 16), (1, 3, 2)])
def test_definitions(shape: tuple[int, int, int]) -> None:
    embeddings = random(*shape) + 0.5
    predictions = random(*shape, seed=1) + 0.5 * embeddings.roll(-1, dims=1)
    measured = values(embeddings, predictions)
    assert measured == pytest.approx(by_definition(embeddings, predictions), abs=1e-5)
    assert measured["one_plus_loss"] == pytest.approx(1 + next_embedding_loss(embeddings, predictions).item(), abs=1e-6)


def test_collapsed_targets() -> None:
    """Every patch the same direction: the loss is perfect, and every diagnostic says why."""
    direction = random(1, 1, 32)
    lengths = 1.0 + torch.rand(4, 9, 1, generator=torch.Generator().manual_seed(1))
    measured = values(direction * lengths, direction.expand(4, 9, 32))
    assert measured["one_plus_loss"] == pytest.approx(0.0, abs=1e-6)
    assert measured["embedding_std"] == pytest.approx(0.0, abs=1e-6)
    assert measured["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert measured["target_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert measured["copy_cosine"] == pytest.approx(1.0, abs=1e-6)


def test_spread_targets() -> None:
    width = 64
    measured = values(random(16, 17, width), random(16, 17, width, seed=1))
    assert measured["effective_rank"] > 0.9 * width
    assert measured["embedding_std"] == pytest.approx(width**-0.5, rel=0.02)
    assert abs(measured["target_cosine"]) < 0.01
    assert abs(measured["copy_cosine"]) < 0.05
    assert measured["one_plus_loss"] == pytest.approx(1.0, abs=0.05)
    assert measured["copy_win"] == pytest.approx(0.5, abs=0.15)


def test_a_predictor_that_copies_and_one_that_predicts() -> None:
    embeddings = random(8, 10, 32)
    assert values(embeddings, embeddings)["copy_win"] == 1.0
    predicted = values(embeddings, embeddings.roll(-1, dims=1))
    assert predicted["copy_win"] == 0.0
    assert predicted["one_plus_loss"] == pytest.approx(0.0, abs=1e-6)
    assert predicted["centred_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_the_centred_cosine_sees_through_a_common_direction() -> None:
    """A predictor that only knows the mean target has a fine loss and a centred cosine of nought."""
    common = 10.0 * random(1, 1, 64)
    embeddings = common + random(32, 17, 64, seed=1)
    predictions = common + random(32, 17, 64, seed=2)
    measured = values(embeddings, predictions)
    assert measured["one_plus_loss"] < 0.05
    assert abs(measured["centred_cosine"]) < 0.05


def test_effective_rank_of_known_spectra() -> None:
    basis = torch.linalg.qr(random(20, 20))[0]
    for rank in (1, 3, 20):
        assert effective_rank(basis[:rank]).item() == pytest.approx(rank, rel=1e-4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-5
    )
    assert effective_rank(torch.zeros(4, 4)).isfinite()


def test_the_sample_of_rows_misses_no_column_of_the_grid() -> None:
    """Patches that depend on their column only: 16 directions, however many images are in the batch."""
    columns = torch.linalg.qr(random(64, 64))[0][:16]
    patches = columns.repeat(16, 1).expand(64, -1, -1)
    embeddings = torch.cat([torch.zeros(64, 1, 64), patches], dim=1)
    rank = values(embeddings, embeddings)["effective_rank"]
    assert rank == pytest.approx(16.0, rel=0.05)


def test_bf16_inputs_are_read_exactly_and_nothing_takes_gradients() -> None:
    embeddings = random(2, 5, 8).bfloat16().requires_grad_()
    measured = collapse_diagnostics(embeddings, embeddings.roll(-1, dims=1))
    assert {value.dtype for value in measured.values()} == {torch.float32}
    assert not any(value.requires_grad for value in measured.values())
    assert values(embeddings, embeddings) == pytest.approx(by_definition(embeddings, embeddings), abs=1e-5)
