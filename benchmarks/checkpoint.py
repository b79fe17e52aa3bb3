"""What a checkpoint costs: stall, write rate, load time, memory. Results go to results/checkpoint.{json,md} here.

The state is that of a real model in training (ViT-B: float32 weights, two moments and an average, 1.37 GB), cut by rows
over the ranks as FSDP does. In each round dd writes as many bytes to the same disk as the save that follows it, so that
what else the machine does falls on both alike; medians are over the rounds.

examples:
  python benchmarks/checkpoint.py                          about three minutes, 3 GB of disk
  python benchmarks/checkpoint.py --size vit_l --ranks 4 --rounds 3 --folder /mnt/scratch
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import RESULTS, machine, publish
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nepa_scale.config import EXIT_USAGE, ConfigError, ModelConfig, ObjectiveConfig
from nepa_scale.models import CausalViT, resolve_architecture
from nepa_scale.objectives import NextEmbedding
from nepa_scale.sharding.shard import Shard
from nepa_scale.training.checkpoint import Checkpointer, find_checkpoint, load_shards
from nepa_scale.training.part_files import FLOAT_BYTES

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def rows_of(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int) -> list[Shard]:
    """The rank's rows of every parameter, with some numbers in them."""
    shards = []
    for name, shape in shapes.items():
        row = torch.Size(shape[1:]).numel()
        rows = -(-shape[0] // world_size)
        start, stop = (min(edge * rows, shape[0]) * row for edge in (rank, rank + 1))
        shards.append(Shard(name, shape, start, stop, {kind: torch.rand(stop - start) for kind in KINDS}))
    return shards


def memory(what: str) -> int:
    """`VmRSS` (bytes now) or `VmHWM` (the most since `forget_peak`) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(rank: int, world_size: int, store: str, run: Path, size: str, threads: int, pipe: Connection) -> None:
    """One rank: does what it is told through the pipe and answers with what it measured."""
    torch.set_num_threads(threads)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    with torch.device("meta"):
        model = NextEmbedding(CausalViT(resolve_architecture(ModelConfig(size=size))), ObjectiveConfig())
    shards = rows_of({name: tuple(p.shape) for name, p in model.named_parameters()}, rank, world_size)
    own = FLOAT_BYTES * sum(tensor.numel() for shard in shards for tensor in shard.tensors.values())
    checkpointer = Checkpointer(run, keep=1, rank=rank, world_size=world_size, stop_on_failure=True)
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    checkpointer.reserve(shards, replicated=False)
    pipe.send((own, time.perf_counter() - began))
    for step, task in enumerate(iter(pipe.recv, None), start=1):
        forget_peak()
        began = time.perf_counter()
        if task == "save":
            checkpointer.save(step, shards, replicated=False, meta={"step": step})
            stall = time.perf_counter() - began
            checkpointer.wait()
            pipe.send((stall, time.perf_counter() - began, memory("VmHWM") - before))
        else:
            resident = memory("VmRSS")
            path = find_checkpoint(run, "auto")
            found = time.perf_counter() - began
            assert path is not None
            load_shards(path, shards)
            pipe.send((found, time.perf_counter() - began - found, memory("VmHWM") - resident))
    checkpointer.close()
    pipe.send(None)


class Ranks:
    """`world_size` processes that hold the state together."""

    def __init__(self, world_size: int, folder: Path, size: str) -> None:
        self.run = folder / f"ranks_{world_size}"
        self.run.mkdir()
        threads = max((os.cpu_count() or 1) // world_size, 1)
        context = multiprocessing.get_context("spawn")
        self._pipes, ends = zip(*(context.Pipe() for _ in range(world_size)), strict=True)
        self._processes = [
            context.Process(
                target=serve, args=(rank, world_size, f"{self.run}/store", self.run, size, threads, end), daemon=True
            )
            for rank, end in enumerate(ends)
        ]
        for process in self._processes:
            process.start()
        answers = [pipe.recv() for pipe in self._pipes]
        self.own_bytes: list[int] = [own for own, _ in answers]
        self.reserve_seconds: float = max(seconds for _, seconds in answers)

    def do(self, task: str) -> tuple[float, float, float]:
        """The largest over the ranks of what `serve` measures; memory as a multiple of the rank's own state."""
        for pipe in self._pipes:
            pipe.send(task)
        answers = [pipe.recv() for pipe in self._pipes]
        extra = max(answer[2] / own for answer, own in zip(answers, self.own_bytes, strict=True))
        return max(answer[0] for answer in answers), max(answer[1] for answer in answers), extra

    def forget_files(self) -> None:
        """Drops the checkpoints from the page cache, so that the next reader reads the disk."""
        for path in self.run.rglob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.recv()
            process.join()
        shutil.rmtree(self.run)


def dd_seconds(folder: Path, size: int) -> float:
    """The time in which dd writes `size` bytes of zeros over the file that it wrote before, and syncs it."""
    began = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=4M", f"count={size >> 22}", "conv=fsync"],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def measure(size: str, world_sizes: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """All numbers of the report: seconds, bytes per second, multiples of a rank's state."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: dict[str, Any] = {"ranks": {}}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds", total=len(world_sizes) * (rounds + 1))
        for count in world_sizes:  # one after the other: together they would not fit into memory
            ranks = Ranks(count, folder, size)
            total = sum(ranks.own_bytes)
            ranks.do("save")  # from the second on, one is also removed
            dd_seconds(folder, total)
            bar.advance(task)
            saves, loads, dds = [], [], []
            for _ in range(rounds):
                dds.append(dd_seconds(folder, total))
                saves.append(ranks.do("save"))
                ranks.forget_files()
                loads.append(ranks.do("load"))
                bar.advance(task)
            ranks.close()
            results["state_bytes"] = total
            results["ranks"][str(count)] = summary(total, ranks.reserve_seconds, saves, loads, dds)
    return results


def summary(total: int, reserve: float, saves: Any, loads: Any, dds: list[float]) -> dict[str, Any]:
    middle = statistics.median
    rates = [total / seconds for _, seconds, _ in saves]
    return {
        "reserve_seconds": reserve,
        "stall_seconds": middle(stall for stall, _, _ in saves),
        "synchronous_seconds": middle(seconds for _, seconds, _ in saves),
        "stall_share": middle(stall / seconds for stall, seconds, _ in saves),
        "write_rate": middle(rates),
        "dd_rate": middle(total / seconds for seconds in dds),
        "write_rate_to_dd": middle(dd / seconds for dd, (_, seconds, _) in zip(dds, saves, strict=True)),
        "verify_seconds": middle(found for found, _, _ in loads),
        "load_seconds": middle(seconds for _, seconds, _ in loads),
        "save_extra_memory": max(extra for _, _, extra in saves),
        "load_extra_memory": max(extra for _, _, extra in loads),
        "rounds": {"stall": [s[0] for s in saves], "synchronous": [s[1] for s in saves], "dd": dds},
    }


def table(facts: dict[str, Any]) -> str:
    """The report in Markdown."""
    columns = facts["ranks"]
    rows = [
        ("stall of a save", lambda r: f"{r['stall_seconds']:.2f} s", ""),
        ("the same save, waited for", lambda r: f"{r['synchronous_seconds']:.2f} s", ""),
        ("stall / synchronous time", lambda r: f"{r['stall_share']:.1%}", "at most 10%"),
        ("reserving host memory, once", lambda r: f"{r['reserve_seconds']:.2f} s", ""),
        ("write rate", lambda r: f"{r['write_rate'] / 1e6:.0f} MB/s", ""),
        ("dd conv=fsync, same bytes", lambda r: f"{r['dd_rate'] / 1e6:.0f} MB/s", ""),
        ("write rate / dd of the same round", lambda r: f"{r['write_rate_to_dd']:.0%}", "at least 80%"),
        ("finding: all verified, page cache dropped before", lambda r: f"{r['verify_seconds']:.2f} s", ""),
        ("loading after that, from the page cache", lambda r: f"{r['load_seconds']:.2f} s", ""),
        ("extra memory of a save / rank's state", lambda r: f"{r['save_extra_memory']:.2f}", "at most 1.2"),
        ("extra memory of a load / rank's state", lambda r: f"{r['load_extra_memory']:.2f}", ""),
    ]
    ranks = " | ".join("1 rank" if n == "1" else f"{n} ranks" for n in columns)
    lines = [
        f"| {facts['size']}, {facts['state_bytes'] / 1e9:.2f} GB | {ranks} | target |",
        f"| --- | {'--- | ' * len(columns)}--- |",
        *(f"| {name} | {' | '.join(show(r) for r in columns.values())} | {target} |" for name, show, target in rows),
    ]
    return (
        f"Measured with `python benchmarks/checkpoint.py` on {facts['machine']}: medians of {facts['repeats']} rounds, "
        "in which dd, a save and a load took turns.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_b", help="model.size (default: vit_b)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="medians are over so many (default: 7)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, default=RESULTS / "checkpoint.json", help="where the numbers go")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint_benchmark_") as folder:
            facts = measure(arguments.size, arguments.ranks, arguments.rounds, Path(folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    facts |= {"size": arguments.size, "repeats": arguments.rounds, "machine": machine()}
    publish(arguments.json, facts, table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
