"""Progress: a bar with loss, accuracy and time left; plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from kaisa.recipes.loop import Training
from kaisa.recipes.tasks import Score

PAUSE = 10.0  # seconds between two plain lines


class TerminalProgress:
    """Shows one bar for reading and one for each run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._reading: TaskID | None = None
        self._running: TaskID | None = None
        self._said = time.monotonic()
        self._score: Score | None = None

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def read(self, done: int, total: int) -> None:
        """Show how much of how much is read."""
        if self._reading is None or done == 1:
            self._reading = self._bars.add_task("reading", total=total, figures="")
        if done % 100 == 0 or done == total:
            self._bars.update(self._reading, completed=done)

    def announce(self, source: str, folder: Path) -> None:
        """Say what is learned from and where the run goes."""
        self._console.print(f"{source}; the run goes to {folder}", highlight=False, soft_wrap=True)

    def begin(self, training: Training) -> None:
        """Show a new run."""
        steps, self._score = len(training.batches), training.score
        self._running = self._bars.add_task(
            f"{training.contestant.name}, seed {training.batches.seed}",
            total=training.epochs * steps,
            completed=len(training.history) * steps,
            figures="",
        )

    def step(self, loss: float, score: float) -> None:
        """Advance by a step."""
        if self._running is not None and self._score is not None:
            figures = f"loss {loss:.3f}"
            if not math.isnan(score):  # detectors look for nothing while they learn
                figures += f"  {self._score.name} {self._score.write(score)}"
            self._bars.update(self._running, advance=1, figures=figures)

    def epoch(self, training: Training) -> None:
        """Show the end of an epoch: every run's last, others now and then."""
        last = training.history[-1]
        loss = "" if training.score.is_loss else f"test loss {last.test_loss:.3f}  "
        figures = f"{loss}test {training.score.name} {training.score.write(last.test_score)}"
        if self._running is not None:
            self._bars.update(self._running, figures=figures)
        quiet = time.monotonic() - self._said < PAUSE
        if not self._console.is_terminal and (training.is_finished or not quiet):
            self._said = time.monotonic()
            self._console.print(
                f"{training.contestant.name}, seed {training.batches.seed}: epoch {last.number} "
                f"of {training.epochs}, {figures}, {last.seconds:.2f} s",
                highlight=False,
                soft_wrap=True,
            )
