"""Runs a worker script under torchrun and leaves no process behind, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"


@dataclass
class World:
    """A running torchrun and the folder that its ranks write to."""

    folder: Path
    agent: subprocess.Popen[bytes]

    def wait(self, seconds: float) -> int:
        """Returns the exit status."""
        return self.agent.wait(seconds)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def error(self, rank: int) -> str:
        """Returns what a rank raised."""
        path = self.folder / f"error_{rank}"
        assert path.exists(), f"rank {rank} raised nothing:\n{self.log}"
        return path.read_text()

    def survivors(self) -> list[int]:
        """Returns the ids of ranks that still run."""
        return [pid for pid in self._processes() if _is_ours(pid)]

    def wait_for(self, name: str, seconds: float = 120.0) -> None:
        """Waits until the ranks have written a file."""
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < end, f"no {name} after {seconds} s:\n{self.log}"
            time.sleep(0.02)

    def _processes(self) -> list[int]:
        return [int(path.name.removeprefix("process_")) for path in self.folder.glob("process_*")]

    def end(self) -> None:
        for pid in (self.agent.pid, *self.survivors()):
            if pid != self.agent.pid or self.agent.poll() is None:
                os.kill(pid, signal.SIGKILL)
        self.agent.wait(10)


def _is_ours(pid: int) -> bool:
    try:
        return b"_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextmanager
def torchrun(
    folder: Path,
    plan: dict[str, Any],
    ranks: int = 2,
    options: Sequence[str] = (),
    before: Sequence[str] = (),
    worker: str = "fault_worker.py",
) -> Iterator[World]:
    """Starts ``ranks`` workers with a plan.

    Args:
        folder: theirs.
        plan: see the worker.
        ranks: how many on this host.
        options: of torchrun, by default those of one host.
        before: what the command line starts with.
        worker: the script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = options or ["--standalone"]
    command = [*before, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with (folder / "log").open("ab") as log:
        agent = subprocess.Popen(
            [*command, str(SUPPORT / worker), json.dumps({**plan, "folder": str(folder)})],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    world = World(folder, agent)
    try:
        yield world
    finally:
        world.end()
