"""Seconds by phase, measured without making the host wait for the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up how long each phase took; on CUDA by events, which are read only when ``means`` is asked."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str, *, counts: bool = True) -> Iterator[None]:
        """Measures what runs inside as part of a phase; ``counts=False`` adds to the occasion that is under way."""
        self._counts[phase] += counts
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
            self._collect(finished_only=True)
        else:
            begin = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - begin

    def restart(self) -> None:
        """Forgets what was measured, so that means are of what comes."""
        self._collect(finished_only=False)
        self._seconds.clear()
        self._counts.clear()

    def means(self) -> dict[str, float]:
        """Returns the mean seconds of each phase when it ran; waits for the device."""
        self._collect(finished_only=False)
        return {phase: self._seconds[phase] / max(1, count) for phase, count in self._counts.items()}

    def _collect(self, *, finished_only: bool) -> None:
        """Adds up measured events in their order, so that the list stays as short as the device's queue."""
        while self._events and not (finished_only and not self._events[0][2].query()):
            phase, start, end = self._events.pop(0)
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
