"""Processes forked from a server that has imported all that a rank needs: they start in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

# torch and DeepSpeed import their compilers when they first shard or step: most of the seconds that a start takes
PRELOADED = [
    "tests.training.programs", "tests.training.matrix", "nepa_scale.train", "deepspeed", "torch._dynamo",
    "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.original_muon",
]  # fmt: skip
_ours: list[int] = []


def warm_processes() -> ForkServerContext:
    """The context whose `Process`es are such; not daemons, since ranks have workers of their own."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if os.getpid() not in _ours:
        server._stop()  # another test's, with other imports; what it has forked lives on
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        multiprocessing.set_forkserver_preload(PRELOADED)
        _ours.append(os.getpid())
    return multiprocessing.get_context("forkserver")
