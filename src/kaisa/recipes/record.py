"""What happened, as JSON: enough to draw every plot again and to judge every figure.

{"format": 2, "kind": "kaisa train", "started": …, "machine": {…}, "versions": {…}, "commit": …,
 "options": {…}, "data": {…}, "runs": [{"contestant": …, "seed": …, "epochs": [{…}, …]}, …]}
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kaisa.errors import StateError
from kaisa.recipes.files import written_whole
from kaisa.recipes.loop import Epoch
from kaisa.recipes.options import Options

FORMAT = 2  # 1 knew no score but accuracy
KIND = "kaisa train"
FILE = "record.json"
MODEL_PACKAGES = ("transformers", "torchvision")
"""Packages that some models are made of, where they are installed."""
PACKAGES = ("kaisa", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib", "pillow", *MODEL_PACKAGES)


@dataclass(frozen=True)
class Run:
    """One contestant with one seed.

    Attributes:
        contestant: its name.
        seed: of weights and batches.
        learning_rate: the highest of the schedule.
        finished: whether all epochs are done.
        steps: how many were taken.
        peak_memory: the most bytes that the process (on a GPU: PyTorch) held in training; None if unknown.
        kfac_memory: the bytes that K-FAC holds, by use; None without it.
        epochs: what each brought.
        model: the type of the model; None in older records.
    """

    contestant: str
    seed: int
    learning_rate: float
    finished: bool
    steps: int
    peak_memory: int | None
    kfac_memory: dict[str, int] | None
    epochs: list[Epoch]
    model: str | None = None

    @property
    def seconds_per_step(self) -> float:
        """The mean over the whole run."""
        return self.epochs[-1].seconds / self.steps

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Run:
        """Make the run that was written; a null among its figures is a loss that diverged."""
        return cls(**{**value, "epochs": [_read_epoch(epoch) for epoch in value["epochs"]]})


def _read_epoch(figures: dict[str, Any]) -> Epoch:
    known: dict[str, Any] = {**_with_nan(figures), "further": _with_nan(figures["further"])}
    return Epoch(**known)


def _with_nan(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in figures.items()}


@dataclass
class Record:
    """All runs of one comparison, and what they depended on."""

    options: Options
    data: dict[str, Any]
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    versions: dict[str, str] = field(default_factory=lambda: describe_versions())
    commit: str | None = field(default_factory=lambda: find_commit())
    runs: list[Run] = field(default_factory=list)

    def put(self, run: Run) -> None:
        """Add a run, in place of what is known of the same contestant and seed."""
        key = run.contestant, run.seed
        self.runs = [known for known in self.runs if (known.contestant, known.seed) != key]
        self.runs.append(run)

    def is_finished(self, contestant: str, seed: int) -> bool:
        """Whether a contestant is through with a seed."""
        return any(run.finished for run in self.runs if (run.contestant, run.seed) == (contestant, seed))

    def runs_of(self, contestant: str) -> list[Run]:
        """Return the runs of a contestant that have at least one epoch."""
        return [run for run in self.runs if run.contestant == contestant and run.epochs]

    @property
    def contestants(self) -> list[str]:
        """The names of those that have run."""
        names = [contestant.name for contestant in self.options.build_contestants()]
        return [name for name in names if self.runs_of(name)]

    def check_model(self, model: nn.Module) -> None:
        """Raise StateError unless a model is of the type that was trained, where the record says."""
        here = type(model).__name__
        strangers = [run.model for run in self.runs if run.model not in (None, here)]
        if strangers:
            raise StateError(f"the run trained a {strangers[0]}, but what is made here is a {here}{self.advice()}")

    def advice(self) -> str:
        """Return how to get the packages that the models of the run were made of; nothing where they are here."""
        if all(run.model is None for run in self.runs):
            return ""  # an older record, which does not know
        here = describe_versions()
        pairs = [(name, self.versions.get(name), here.get(name)) for name in MODEL_PACKAGES]
        return "".join(f"; {_advise(name, then, now)}" for name, then, now in pairs if then != now)

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        value = _without_infinities({"format": FORMAT, "kind": KIND, **asdict(self)})
        with written_whole(folder / FILE) as partial:
            partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read the record of a folder.

        Raises:
            StateError: there is none, or it is not one of this library.
        """
        path = folder / FILE
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StateError(f"no run to resume in {folder}: {FILE} is missing") from error
        except ValueError as error:
            raise StateError(f"{path} is damaged; start the run anew") from error
        if not isinstance(value, dict) or (value.get("format"), value.get("kind")) != (
            FORMAT,
            KIND,
        ):
            raise StateError(f"{path} is not a record of {KIND} in format {FORMAT}")
        options = Options.from_json(value["options"])
        runs = [Run.from_json(run) for run in value["runs"]]
        kept = {name: value[name] for name in ("data", "started", "machine", "versions", "commit")}
        return cls(options=options, runs=runs, **kept)


def _without_infinities(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _advise(package: str, then: str | None, now: str | None) -> str:
    if then is None:
        return f"it began without {package}; use an environment that has none"
    return f"it began with {package} {then}, here is {now or 'none'}; pip install {package}=={then}"


def describe_machine() -> dict[str, Any]:
    """Return what the measured seconds depend on; no names of hosts or users."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part."""
    return {"python": platform.python_version(), **dict(_installed(PACKAGES))}


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def find_commit() -> str | None:
    """Return the commit of the library's source, with "-dirty" if changed; None outside git."""
    source = Path(__file__)
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
