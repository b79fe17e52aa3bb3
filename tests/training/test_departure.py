"""A program of several ranks ends with the status that it was given, whatever its process groups' threads still do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.launch import REPOSITORY, launcher

PROGRAM = """
import sys

import torch
import torch.distributed as dist

from nepa_scale.training.departure import depart

dist.init_process_group("gloo")
known = dist.group.WORLD  # as FSDP2 and DeepSpeed go on to know theirs: its threads outlive the group's destruction
tensors = [torch.ones(4) for _ in range(50)]
for tensor in tensors:
    dist.all_reduce(tensor)
del tensor, tensors
dist.destroy_process_group()
print("left")
depart(int(sys.argv[1]))
"""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_gloo_does_not_abort_ranks_that_are_done(tmp_path: Path) -> None:
    """With sys.exit in depart's place every second launch fails."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for _ in range(3):
        done = run([*launcher("torchrun", 4), str(program), "0"])
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("left") == 4  # what was printed is not lost


def test_status_arrives() -> None:
    words = "from nepa_scale.training.departure import depart; print('left'); depart(75)"
    done = run([sys.executable, "-c", words])
    assert (done.returncode, done.stdout) == (75, "left\n")
