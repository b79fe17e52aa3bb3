"""Mirrors of a run's metrics.jsonl, which stays the truth."""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from nepa_scale.training.run_folder import read_json_lines

RUN_ID = "wandb_id"  # file in the run folder: all starts of a run are one run there

PUBLIC_MACHINE = "api.wandb.ai"  # under which logins to the public server are kept, whatever its present address
PUBLIC_SERVERS = (PUBLIC_MACHINE, "api.forge.coreweave.com")


class Tracker(Protocol):
    """Receives a copy of each row of metrics.jsonl."""

    def go_on_from(self, step: int) -> None:
        """The run starts or goes on after this step (-1: not even step 0 is done); rows of later steps are void."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; offline where nobody is logged in. A failure there is reported once and never stops the run.

    However often it stops, goes on or goes back, a run is one run of wandb, whose id lies in the run folder, and its
    history ends where the run does. Online, wandb is asked to take its history back to the step from which the run goes
    on. Offline it cannot, and of two offline folders of a run the one that is synced last replaces the other; so each
    start writes metrics.jsonl again from its beginning, and the folders before it are removed.
    """

    def __init__(self, run_folder: Path, config: dict[str, Any]) -> None:
        self._folder, self._config = run_folder, config
        self._run: Any = None
        self._available = True

    def go_on_from(self, step: int) -> None:
        """Opens the run, or opens it anew; metrics.jsonl has no rows of later steps any more."""
        self._attempt(lambda: self._open(step))

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log(row, step=row["step"]))

    def close(self) -> None:
        if self._run is not None:
            self._attempt(self._leave)

    def _open(self, step: int) -> None:
        import wandb

        self._finish()
        run_id = _run_id(self._folder)
        common: dict[str, Any] = {
            "project": "nepa_scale",
            "dir": str(self._folder),
            "config": self._config,
            "name": self._folder.name,
            "settings": wandb.Settings(init_timeout=30),
        }
        settings = wandb.setup().settings
        mode: Any = settings.mode
        if not os.environ.get("WANDB_MODE") and mode == "online" and not _logged_in(settings.base_url):
            mode = "offline"
        if mode != "online":
            self._run = wandb.init(id=run_id, mode=mode, **common)
            if self._run.offline:
                self._replay(run_id)
            return
        self._run = wandb.init(id=run_id, resume="allow", **common)
        if self._run.step > step + 1:  # where wandb would go on
            self._finish()
            self._run = wandb.init(resume_from=f"{run_id}?_step={max(step, 0)}", **common)

    def _replay(self, run_id: str) -> None:
        for row in read_json_lines(self._folder / "metrics.jsonl"):
            self._run.log(row, step=row["step"])
        present = Path(self._run.dir).parent
        for file in (self._folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"):
            if file.parent.resolve() != present.resolve():
                shutil.rmtree(file.parent, ignore_errors=True)

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _leave(self) -> None:
        import wandb

        self._finish()
        wandb.teardown()  # waits for its writer, a process of its own: this one may end without further ado

    def _attempt(self, act: Callable[[], Any]) -> None:
        """Whatever a tracker does, training goes on."""
        if not self._available:
            return
        try:
            act()
        except Exception as error:
            self._run, self._available = None, False
            print(f"wandb is not available and this run goes on without it: {error}", file=sys.stderr)


def _run_id(folder: Path) -> str:
    """That of the earlier starts; at the first, the user's own (WANDB_RUN_ID) or a new one."""
    path = folder / RUN_ID
    if path.is_file() and (kept := path.read_text().strip()):
        return kept
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    path.write_text(f"{run_id}\n")
    return run_id


def _logged_in(address: str) -> bool:
    """Whether there is a key for the server: in the environment, or in the netrc file to which `wandb login` writes."""
    machine = urlsplit(address).netloc
    machines = {machine, PUBLIC_MACHINE} if machine in PUBLIC_SERVERS else {machine}
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    places = [Path(named).expanduser()] if named else [Path.home() / name for name in (".netrc", "_netrc")]
    for place in places:
        try:
            entries = netrc.netrc(place)
        except (OSError, netrc.NetrcParseError):
            continue
        if any(entry and entry[2] for entry in map(entries.authenticators, machines)):
            return True
    return False
