"""Steps that are not finite, or spikes, on the real program: all ranks skip together and say on whose samples."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from nepa_scale.training.update_guard import WINDOW, UpdateGuard
from tests.launch import write_shards
from tests.training.programs import Program, arguments_of, losses_of, read_json_lines, samples_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


def poison(rank: int, *, kind: str, on: int, steps: list[int]) -> None:
    """Makes the loss (or only the gradient) of one rank not finite, or the gradient large, in some steps' passes.

    A pass is counted when it happens: a step that is made anew after a rewind is another pass.
    """
    from nepa_scale.training.pretraining import Pretraining

    if rank != on:
        return
    inputs, passes = Pretraining.inputs, iter(range(1, 1000))

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(context: object, images: torch.Tensor) -> torch.Tensor:
            del context
            return images

        @staticmethod
        def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            del context
            return gradient * (1e6 if kind == "spike" else float("nan"))

    def poisoned(self, batch, step):  # type: ignore[no-untyped-def]
        found = inputs(self, batch, step)
        if next(passes) in steps:
            if kind == "loss":
                found["images"] = found["images"] * float("nan")
            else:
                found["rope_scale"] = Poisoned.apply(found["rope_scale"].requires_grad_())
        return found

    Pretraining.inputs = poisoned  # type: ignore[method-assign]
    if kind != "loss":  # where the tokens begin, so that it reaches the embedding's gradient
        from nepa_scale.models.vit import CausalViT

        forward = CausalViT.forward

        def forwarded(self, images, **more):  # type: ignore[no-untyped-def]
            scale = more.get("rope_scale")
            poisonous = scale is not None and scale.requires_grad
            if poisonous:
                more["rope_scale"] = scale.detach()
            embeddings, predictions = forward(self, images, **more)
            return embeddings, Poisoned.apply(predictions) if poisonous else predictions

        CausalViT.forward = forwarded  # type: ignore[method-assign]


def run_two(arguments: list[str], folder: Path, prepare: functools.partial[None] | None = None) -> Program:
    return Program(arguments, 2, folder, prepare)


def counters(run: Path, step: int) -> dict[str, int]:
    meta = json.loads((run / "checkpoints" / f"step_{step:08d}" / "meta.json").read_text())["values"]
    return {key: meta[key] for key in ("step", "optimizer_steps", "samples_seen", "passed_over")}


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run whose step 3 is skipped."""
    folder = tmp_path_factory.mktemp("expected")
    arguments = arguments_of(shards, folder / "run", "strategy=ddp", "train.steps=5")
    program = run_two(arguments, folder, functools.partial(poison, kind="loss", on=0, steps=[3]))
    assert program.wait() == [0, 0], program.said()
    return losses_of(folder / "run")


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("ddp", "gradient"), ("fsdp", "gradient"), ("fsdp", "loss"), ("zero1", "gradient"), ("zero3", "loss")],
)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(
    strategy: str, kind: str, shards: Path, expected: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(
        shards, run, f"strategy={strategy}", "train.steps=5", "checkpoint.every=1", "checkpoint.keep=9"
    )
    program = run_two(arguments, tmp_path / "said", functools.partial(poison, kind=kind, on=1, steps=[3]))
    assert program.wait() == [0, 0], program.said()
    rank_1 = {row["step"]: row["keys"] for row in read_json_lines(run / "samples" / "rank_1.jsonl")}
    assert read_json_lines(run / "skipped_steps.jsonl") == [
        {"step": 3, "why": "not finite on rank 1", "ranks": [1], "keys": rank_1[3]}
    ]
    assert f"step 3 was skipped: not finite on rank 1; samples {' '.join(rank_1[3])}" in program.said()
    assert counters(run, 3) == {"step": 3, "optimizer_steps": 2, "samples_seen": 24, "passed_over": 0}
    assert counters(run, 5) == {"step": 5, "optimizer_steps": 4, "samples_seen": 40, "passed_over": 0}
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0, 0]
    assert [row["lr"] for row in rows[:3]] == [0.0, 5e-4, 1e-3]  # a skipped step keeps its place in the schedule
    assert tensors(run, 3) == tensors(run, 2)  # weights, moments and moving average
    assert tensors(run, 4) != tensors(run, 3)
    losses = losses_of(run)
    assert losses.pop(3) is None
    assert losses == pytest.approx({step: loss for step, loss in expected.items() if step != 3}, rel=1e-5)


def tensors(run: Path, step: int) -> list[bytes]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return [path.read_bytes() for path in sorted(folder.glob("part_*.safetensors"))]


def test_too_many_in_a_row_stop_the_run(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(shards, run, "strategy=fsdp", "checkpoint.every=1", "train.max_skipped=2")
    program = run_two(arguments, tmp_path / "said", functools.partial(poison, kind="loss", on=0, steps=[2, 4, 5]))
    assert program.wait() == [1, 1]
    assert "2 steps in a row up to step 5 were skipped (not finite on rank 0" in program.said()
    assert "Traceback" not in program.said()


@pytest.mark.parametrize("strategy", ["zero3"])
def test_rewinding_passes_over_the_bad_data(strategy: str, shards: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    common = [f"strategy={strategy}", "train.steps=6", "checkpoint.every=2"]
    assert run_two(arguments_of(shards, whole, *common), tmp_path / "whole_said").wait() == [0, 0]
    arguments = arguments_of(shards, run, *common, "train.max_skipped=2", "train.on_bad_steps=rewind")
    program = run_two(arguments, tmp_path / "said", functools.partial(poison, kind="loss", on=1, steps=[4, 5]))
    assert program.wait() == [0, 0], program.said()
    assert "going back to step 2: steps 4 to 5 were bad; 3 batches are passed over" in program.said()
    assert counters(run, 6) == {"step": 6, "optimizer_steps": 6, "samples_seen": 48, "passed_over": 3}
    seen, expected = samples_of(run), samples_of(whole)
    assert [seen[step] for step in (1, 2)] == [expected[step] for step in (1, 2)]
    assert seen[3] == expected[6]  # batches 3, 4 and 5 are not seen again
    assert losses_of(run)[2] == losses_of(whole)[2]
    assert sorted(losses_of(run)) == [1, 2, 3, 4, 5, 6]
    resumed = run_two(arguments_of(shards, run, *common[:1], "train.steps=7"), tmp_path / "resumed_said")
    assert resumed.wait() == [0, 0], resumed.said()
    assert counters(run, 7)["passed_over"] == 3


def test_rewinding_again_and_again_ends(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(
        shards, run, "strategy=ddp", "checkpoint.every=2", "train.max_skipped=1", "train.on_bad_steps=rewind"
    )
    program = run_two(
        arguments, tmp_path / "said", functools.partial(poison, kind="loss", on=0, steps=list(range(3, 99)))
    )
    assert program.wait() == [1, 1]
    assert program.said().count("going back to step 2") == 3


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_a_spike_is_skipped(strategy: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(
        shards, run, f"strategy={strategy}", "train.steps=22", "train.spike_factor=10", "checkpoint.every=1",
        "checkpoint.keep=9",
    )  # fmt: skip
    program = run_two(arguments, tmp_path / "said", functools.partial(poison, kind="spike", on=1, steps=[5, 20]))
    assert program.wait() == [0, 0], program.said()
    skipped = read_json_lines(run / "skipped_steps.jsonl")
    assert [row["step"] for row in skipped] == [20]  # at step 5 too little was known
    assert skipped[0]["why"].startswith("a spike: the gradient norm was ")
    assert counters(run, 22)["optimizer_steps"] == 21
    assert tensors(run, 20) == tensors(run, 19)
    assert tensors(run, 21) != tensors(run, 20)


def norms(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def test_the_window_rolls_and_forgets_what_was_refused() -> None:
    guard = UpdateGuard(4.0, torch.device("cpu"))
    assert not any(guard(norm) for norm in norms(*[1.0] * 20))
    assert guard(torch.tensor(4.1))
    assert not guard(torch.tensor(3.9))
    assert guard(torch.tensor(float("nan")))
    assert guard(torch.tensor(float("inf")))
    assert not any(guard(norm) for norm in norms(*[3.9] * WINDOW))
    assert not guard(torch.tensor(15.0))
    assert bool(guard(torch.tensor(16.0))) is True


def test_a_guard_goes_on_where_it_was_saved() -> None:
    guard, resumed = (UpdateGuard(2.0, torch.device("cpu")) for _ in range(2))
    for norm in norms(*[float(i % 3 + 1) for i in range(30)]):
        guard(norm)
    resumed.load(json.loads(json.dumps(guard.state())))
    for value in (1.0, 3.9, 4.1, 2.0):
        assert bool(guard(torch.tensor(value))) == bool(resumed(torch.tensor(value)))
    assert guard.state() == resumed.state()


def test_without_a_factor_only_what_is_not_finite_is_refused() -> None:
    guard = UpdateGuard(0.0, torch.device("cpu"))
    assert not any(guard(norm) for norm in norms(*[1.0] * 40, 1e30))
    assert guard(torch.tensor(float("inf")))
