"""The training step on this host, each number a ratio within one run: what is compared takes turns.

Our step against the same model in plain PyTorch (official_style.py); FSDP2 and ZeRO-3 against DDP on two ranks; what
recomputation saves and costs; and what the training loop adds to the step. Results go to results/step.{json,md} here.
GPUs have a program of their own, gpu_check.py.

examples:
  python benchmarks/step.py                            ViT-S, about 12 minutes on two quiet cores
  python benchmarks/step.py --size vit_ti --rounds 2   a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from official_style import PlainStep, PlainViT
from report import RESULTS, machine, publish
from rich.progress import track
from torch import Tensor

from nepa_scale import train
from nepa_scale.config import Config, load_config
from nepa_scale.objectives import NextEmbedding
from nepa_scale.profiling.throughput import Spread, StepRunner
from nepa_scale.sharding import World, join_world, leave_world, max_over_ranks
from nepa_scale.sharding.torch_strategy import TorchStrategy
from nepa_scale.training.agreement import Agreement
from nepa_scale.training.backward_probe import BackwardProbe
from nepa_scale.training.departure import depart
from nepa_scale.training.ema import MovingAverage
from nepa_scale.training.loop import Logs
from nepa_scale.training.metrics import Meter
from nepa_scale.training.pretraining import Pretraining
from nepa_scale.training.update_guard import UpdateGuard

STRATEGIES = ("ddp", "fsdp", "zero3")
RECOMPUTE = {
    "none": (), "selective": ("activation_checkpointing=selective",), "full": ("activation_checkpointing=full",),
    "a memory budget of 0.5": ("activation_memory_budget=0.5",),
}  # fmt: skip
Step = Callable[[], Any]


def config_of(arguments: argparse.Namespace, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"model.size={arguments.size}", f"model.image_size={arguments.image_size}", "train.precision=fp32",
            f"train.global_batch_size={arguments.batch}", "train.steps=1", "compile=false", *overrides,
        ],
    )  # fmt: skip


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Least, median and largest over the rounds of one time in units of the other."""
    spread = Spread.of([one / other for one, other in zip(above, below, strict=True)])
    return [spread.least, spread.median, spread.most]


def plain_step(runner: StepRunner) -> PlainStep:
    """The peer with the runner's weights."""
    a, module = runner.task.architecture, runner.strategy.module
    assert isinstance(module, NextEmbedding)
    model = PlainViT(
        a.width, a.depth, a.heads, a.mlp_width, a.patch_size, gated=a.gated, qk_norm=a.qk_norm != "none"
    ).to(runner.world.device)
    model.load(module.backbone.state_dict())
    return PlainStep(model, runner.config.train.precision, runner.config.ema.decay)


def against_plain(arguments: argparse.Namespace, world: World) -> dict[str, list[float]]:
    """Seconds of the peer and of our step, as it is and compiled."""
    runner, compiled = (StepRunner(config_of(arguments, f"compile={words}"), world) for words in ("false", "true"))
    plain, images = plain_step(runner), next(runner.batches).images
    steps: dict[str, Step] = {"plain": lambda: plain(images), "ours": lambda: runner.step(_ignore)}
    seconds = in_turns(steps | {"compiled": lambda: compiled.step(_ignore)}, arguments.rounds)
    runner.close()
    compiled.close()
    return seconds


def recomputation(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Of compiled steps: by mode the bytes kept, what share of others' they save, and the time in units of none's.

    Not compiled, norms and rotations are redone one pass over memory each; GPUs compile by default.
    """
    precision = "bf16" if bf16_in_hardware() else "fp32"
    own = {name: (f"train.precision={precision}", "compile=true", *words) for name, words in RECOMPUTE.items()}
    runners = {name: StepRunner(config_of(arguments, *words), world) for name, words in own.items()}
    kept, steps = {}, {}
    for name, runner in runners.items():
        runner.step(_ignore)
        kept[name] = kept_bytes(runner)
        steps[name] = lambda runner=runner: runner.step(_ignore)
    seconds = in_turns(steps, arguments.rounds)
    for runner in runners.values():
        runner.close()
    eager = StepRunner(config_of(arguments, f"train.precision={precision}"), world)
    not_compiled = kept_bytes(eager)
    eager.close()
    modes = {
        name: {
            "kept_bytes": kept[name],
            "saved": 1 - kept[name] / kept["none"],
            "saved_of_not_compiled": 1 - kept[name] / not_compiled,
            "time": ratio(seconds[name], seconds["none"]),
        }
        for name in RECOMPUTE
    }
    return {"precision": precision, "modes": modes}


def kept_bytes(runner: StepRunner) -> int:
    """What a forward pass leaves in memory for the backward pass, beside parameters and images."""
    images = torch.zeros_like(next(runner.batches).images, dtype=torch.float32)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*runner.strategy.module.parameters(), images)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = runner.strategy.module(images, rope_scale=torch.ones(()))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del outputs
    return total


class Stopwatch:
    """Seconds spent in methods, by part; of nested ones in the inner."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def timed(self, owner: type, method: str, part: str) -> Any:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                whole = time.perf_counter() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + whole - self._inner.pop()
                self._inner[-1] += whole

        return mock.patch.object(owner, method, call)


PARTS = (
    (TorchStrategy, "forward_backward", "forward and backward"), (TorchStrategy, "step", "optimiser"),
    (UpdateGuard, "__call__", "guards"), (BackwardProbe, "_look", "guards"), (BackwardProbe, "take", "guards"),
    (MovingAverage, "update", "moving average"), (Meter, "add_step", "metrics"), (Meter, "row", "metrics"),
    (Pretraining, "diagnostics", "metrics"), (Logs, "add_row", "metrics"), (Agreement, "begin", "agreement"),
    (Agreement, "finish", "agreement"), (Pretraining, "inputs", "inputs"),
)  # fmt: skip


@contextmanager
def watched_loop(watch: Stopwatch) -> Iterator[list[tuple[float, dict[str, float]]]]:
    """Within the context the parts are timed; notes clock and stopwatch whenever a row has been logged."""
    noted: list[tuple[float, dict[str, float]]] = []
    with ExitStack() as stack:
        for owner, method, part in PARTS:
            stack.enter_context(watch.timed(owner, method, part))
        add_row = Logs.add_row

        def note(logs: Logs, row: dict[str, Any]) -> None:
            add_row(logs, row)
            noted.append((time.perf_counter(), watch.seconds | {"waiting for data": row["data_seconds"]}))

        stack.enter_context(mock.patch.object(Logs, "add_row", note))
        yield noted


def loop_shares(arguments: argparse.Namespace) -> dict[str, float]:
    """Of the time of the training loop, without its first window and without its wait for data, by part."""
    steps, every = 5 * arguments.rounds, 5
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="step_") as folder, watched_loop(watch) as noted:
        words = [
            f"model.size={arguments.size}", f"model.image_size={arguments.image_size}", "train.precision=fp32",
            f"train.global_batch_size={arguments.batch}", f"train.steps={steps + every}", f"train.log_every={every}",
            f"data.train={arguments.shards}", "data.val=null", "checkpoint.every=0", "evaluate.every=0",
            "data.workers=1", "schedule.warmup_steps=1", "optimizer.lr=1e-4", f"output={folder}",
        ]  # fmt: skip
        if train.main(["--config", os.devnull, *words]) != 0:
            raise SystemExit("the training run failed")
    (began, before), (ended, after) = noted[0], noted[-1]
    waited = sum(parts["waiting for data"] for _, parts in noted[1:]) * every
    total = ended - began - waited
    parts = {part: (after[part] - before.get(part, 0.0)) / total for part in watch.seconds}
    return parts | {"the rest": 1 - sum(parts.values())}


def strategies(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of two ranks, launched here."""
    with tempfile.TemporaryDirectory(prefix="step_") as folder:
        result = Path(folder) / "ranks.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
            "--size", arguments.size, "--image-size", str(arguments.image_size), "--batch", str(arguments.batch),
            "--rounds", str(arguments.rounds), "--ranks", str(result),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, env=environment)
        seconds = json.loads(result.read_text())
    return {
        "seconds": seconds,
        "rate_of_ddp": {name: ratio(seconds["ddp"], seconds[name]) for name in STRATEGIES[1:]},
    }


def on_ranks(arguments: argparse.Namespace) -> None:
    """Each strategy's steps, several times over, on this rank; the slowest rank's seconds."""
    world = join_world()
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for _ in range(arguments.rounds):
        for name in STRATEGIES:
            runner = StepRunner(config_of(arguments, f"strategy={name}"), world)
            took = in_turns({name: lambda runner=runner: runner.step(_ignore)}, 3)[name]
            runner.close()
            seconds[name].append(max_over_ranks(Spread.of(took).median, world.device))
    if world.is_main:
        arguments.ranks.write_text(json.dumps(seconds))
    leave_world()
    depart(0)


def bf16_in_hardware() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and ("avx512_bf16" in cpuinfo.read_text() or "amx_bf16" in cpuinfo.read_text())


def bf16_speed(arguments: argparse.Namespace, world: World, compiled: str) -> dict[str, list[float]]:
    """Seconds in fp32 and in bf16."""
    words = {one: (f"train.precision={one}", f"compile={compiled}") for one in ("fp32", "bf16")}
    runners = {one: StepRunner(config_of(arguments, *words[one]), world) for one in words}
    steps = {name: (lambda runner=runner: runner.step(_ignore)) for name, runner in runners.items()}
    seconds = in_turns(steps, arguments.rounds)
    for runner in runners.values():
        runner.close()
    return seconds


def table(facts: dict[str, Any]) -> str:
    recompute, parts = facts["recompute"], facts["loop"]
    overhead = 1 - parts["forward and backward"] - parts["optimiser"]
    watching = sum(parts.get(name, 0.0) for name in ("guards", "moving average", "metrics"))
    bf16, compiled = (
        _faster(facts[name], "fp32", "bf16") if facts[name] else "not measured: this CPU has no bf16 products"
        for name in ("bf16", "bf16 compiled")
    )
    rows = [
        ("our step, in units of plain PyTorch's rate", _faster(facts["plain"], "plain", "ours"), ">= 1.0"),
        ("our step, compiled, in the same units", _faster(facts["plain"], "plain", "compiled"), ""),
        ("bf16, in units of fp32's rate, both compiled", compiled, ">= 2 with avx512_bf16"),
        ("the same, not compiled", bf16, ""),
        *(
            (f"{name}, 2 ranks, in units of ddp's rate", _range(spread), ">= 0.8")
            for name, spread in facts["strategies"]["rate_of_ddp"].items()
        ),
        *_recompute_rows(recompute),
        ("training loop: all but forward, backward and optimiser", f"{overhead:.1%}", "<= 2%"),
        ("of it metrics, guards and moving average", f"{watching:.1%}", "<= 1%"),
    ]
    lines = [
        f"Measured with `{facts['command']}` on {facts['machine']}: {facts['size']}, {facts['image_size']} px, "
        f"{facts['batch']} images a step, fp32 unless said otherwise, the optimiser and the moving average included; "
        f"medians of {facts['rounds']} rounds in which what is compared took turns, in brackets the least and the "
        "largest.",
        "",
        "| | measured | target |",
        "| --- | --- | --- |",
        *(f"| {name} | {measured} | {target} |" for name, measured, target in rows),
        "",
        "The loop's time, without waiting for data: "
        + ", ".join(f"{part} {share:.1%}" for part, share in sorted(parts.items(), key=lambda item: -item[1]))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _recompute_rows(recompute: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    targets = {"selective": (">= 45%", "<= 1.08"), "full": ("", "<= 1.33")}
    for name, mode in recompute["modes"].items():
        memory, time_ = targets.get(name, ("", ""))
        if name == "none":
            yield "compiled, without recomputation: activation memory saved", f"{mode['saved_of_not_compiled']:.0%}", ""
            continue
        what = f"recomputation: {name}, {recompute['precision']}, compiled"
        saved = f"{mode['saved']:.0%}; of what is kept not compiled {mode['saved_of_not_compiled']:.0%}"
        yield f"{what}: activation memory saved", saved, memory
        yield f"{what}: time", _range(mode["time"]), time_


def _faster(seconds: dict[str, list[float]], than: str, name: str) -> str:
    """With the ratio of least times: others, who may share the machine's unit for bf16 products, only slow it down."""
    least = min(seconds[than]) / min(seconds[name])
    return f"{_range(ratio(seconds[than], seconds[name]))}; of the least times {least:.2f}"


def _range(spread: list[float]) -> str:
    least, median, most = spread
    return f"{median:.2f} ({least:.2f} - {most:.2f})"


def _ignore(_phase: str) -> None:
    """No timing."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_s", help="of the model (default: vit_s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="(default: 224)")
    parser.add_argument("--batch", type=int, default=16, metavar="IMAGES", help="of a step (default: 16)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--shards", default="data/demo/train", help="for the loop (tools/make_demo_data.py makes them)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "step.json", metavar="FILE", help="JSON; .md beside it"
    )
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)  # set for the launched ranks
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.ranks:
        on_ranks(arguments)
        return
    facts: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "machine": machine(), "size": arguments.size,
        "image_size": arguments.image_size, "batch": arguments.batch, "rounds": arguments.rounds,
    }  # fmt: skip
    world = join_world()
    alone: dict[str, Callable[[], Any]] = {
        "plain": lambda: against_plain(arguments, world),
        "recompute": lambda: recomputation(arguments, world),
        "bf16": lambda: bf16_speed(arguments, world, "false") if bf16_in_hardware() else None,
        "bf16 compiled": lambda: bf16_speed(arguments, world, "true") if bf16_in_hardware() else None,
    }
    for name, part in track(alone.items(), "one process"):
        facts[name] = part()
    leave_world()
    facts["loop"] = loop_shares(arguments)
    facts["strategies"] = strategies(arguments)
    publish(arguments.output, facts, table(facts))


if __name__ == "__main__":
    main()
