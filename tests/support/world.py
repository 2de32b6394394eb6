"""A simulated world: every rank a thread, so that a missing or reordered collective is an assertion and not a hang.

All ranks of an operation must present the same header: the operation, its kind, its ranks, how many operations this
set of ranks has had before, and the type and shape of what is sent. What i sends to j must be as long as j expects.
Whatever one rank does wrong is an error on all of them. A rank that waits for what never comes is found at once when
every other rank waits too or has ended, and after ``timeout`` seconds otherwise.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from kaisa.kfac.collectives import Collectives, Wait

T = TypeVar("T")
Ranks = tuple[int, ...]
Key = tuple[str, Ranks, int]  # whose group, its ranks, and how many operations it has had before


@dataclass
class Meeting:
    """One operation of a set of ranks: what the first of them presented, and what each has brought."""

    ranks: Ranks
    header: str
    presenter: int
    brought: dict[int, list[Tensor]] = field(default_factory=dict)
    expected: dict[int, list[int]] = field(default_factory=dict)
    is_wrong: bool = False

    @property
    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.brought]


class World:
    """Where the ranks meet."""

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size = size
        self.timeout = timeout
        self.failure: str | None = None
        self._condition = threading.Condition()
        self._meetings: dict[Key, Meeting] = {}
        self._waiting: dict[int, Meeting] = {}
        self._ended: set[int] = set()

    def join(self, rank: int, key: Key, header: str, chunks: list[Tensor], sizes: list[int]) -> Meeting:
        """Brings a rank's part to the meeting of this key, and returns the meeting."""
        group, ranks, number = key
        with self._condition:
            self._raise_failure()
            meeting = self._meetings.setdefault(key, Meeting(ranks, header, rank))
            if meeting.header != header:
                self._fail(
                    f"ranks disagree on operation {number} of {group} among {ranks}: "
                    f"rank {meeting.presenter} presents {meeting.header}, rank {rank} presents {header}"
                )
            meeting.brought[rank] = [chunk.detach().clone() for chunk in chunks]
            meeting.expected[rank] = list(sizes)
            if not meeting.missing:
                self._check_sizes(meeting)
            self._condition.notify_all()
            return meeting

    def _check_sizes(self, meeting: Meeting) -> None:
        for receiver in meeting.ranks:
            for sender, size in zip(meeting.ranks, meeting.expected[receiver], strict=True):
                sent = meeting.brought[sender][meeting.ranks.index(receiver)].numel()
                if sent != size:
                    meeting.is_wrong = True
                    self._fail(
                        f"{meeting.header}: rank {sender} sends {sent} numbers to rank {receiver}, which expects {size}"
                    )

    def wait(self, rank: int, meeting: Meeting) -> None:
        """Waits until all ranks have come."""
        with self._condition:
            self._waiting[rank] = meeting
            self._check_deadlock()
            if not self._condition.wait_for(lambda: self.failure or not meeting.missing, self.timeout):
                self._fail(f"rank {rank} waited {self.timeout} s: {self._where()}")
            del self._waiting[rank]
            if meeting.missing or meeting.is_wrong:
                self._raise_failure()

    def end(self, rank: int, failure: str | None = None) -> None:
        """Notes that a rank has ended, and whether it has failed."""
        with self._condition:
            self._ended.add(rank)
            self.failure = self.failure or failure
            if self.failure is None:
                with suppress(AssertionError):  # those who wait will raise it
                    self._check_deadlock()
            self._condition.notify_all()

    def check_complete(self) -> None:
        """Asserts that nobody left an operation that others have not joined."""
        for meeting in self._meetings.values():
            assert not meeting.missing, f"ranks {meeting.missing} never came to {meeting.header}"

    def _check_deadlock(self) -> None:
        waiting = {rank for rank, meeting in self._waiting.items() if meeting.missing}
        if self.failure is None and waiting and len(waiting | self._ended) == self.size:
            self._fail(f"nobody can go on: {self._where()}")

    def _where(self) -> str:
        places = [
            f"rank {rank} waits for ranks {meeting.missing} in {meeting.header}"
            for rank, meeting in sorted(self._waiting.items())
            if meeting.missing
        ]
        return "; ".join([*places, *(f"rank {rank} has ended" for rank in sorted(self._ended))])

    def _fail(self, message: str) -> None:
        self.failure = self.failure or message
        self._condition.notify_all()
        raise AssertionError(self.failure)

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise AssertionError(self.failure)


class Simulated(Collectives):
    """One rank of a world."""

    def __init__(self, world: World, rank: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world.size
        self.world = world
        self.everyone = tuple(range(world.size))
        self.prepared: set[Ranks] = {self.everyone}
        self._numbers: Counter[tuple[str, Ranks]] = Counter()

    def prepare(self, groups: Iterable[Ranks]) -> None:
        new = sorted(set(groups) - self.prepared)
        self._join("prepare", self.everyone, str(new), [], [])()
        self.prepared.update(new)

    def mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean over all ranks in a group of its own, off the account, as DistributedDataParallel does."""
        sent = self._to_all(self.everyone, tensor)
        receive = self._join("mean", self.everyone, f"{tuple(tensor.shape)}", *sent, group="the user")
        return torch.stack(receive()).mean(0)

    def _exchange(self, kind: str, ranks: Ranks, chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        assert len(chunks) == len(sizes) == len(ranks), f"{kind}: {len(chunks)} chunks, {len(sizes)} sizes for {ranks}"
        assert all(chunk.ndim == 1 for chunk in chunks), f"{kind}: chunks are flat"
        (dtype,) = {chunk.dtype for chunk in chunks}
        return self._join("exchange", ranks, f"{kind} {dtype}", list(chunks), list(sizes))

    def _total(self, kind: str, ranks: Ranks, tensor: Tensor) -> Tensor:
        what = f"{kind} {tensor.dtype} {tuple(tensor.shape)}"
        return torch.stack(self._join("total", ranks, what, *self._to_all(ranks, tensor))()).sum(0)

    def _to_all(self, ranks: Ranks, tensor: Tensor) -> tuple[list[Tensor], list[int]]:
        return [tensor] * len(ranks), [tensor.numel()] * len(ranks)

    def _join(
        self, operation: str, ranks: Ranks, what: str, chunks: list[Tensor], sizes: list[int], group: str = "K-FAC"
    ) -> Wait:
        assert list(ranks) == sorted(set(ranks)), f"ranks {ranks} are not sorted"
        assert self.rank in ranks, f"rank {self.rank} is not one of {ranks}"
        assert ranks in self.prepared, f"nobody prepared {ranks}"
        number = self._numbers[group, ranks]
        self._numbers[group, ranks] += 1
        header = f"{operation} {what} number {number} among {ranks}"
        silent = [torch.empty(0)] * len(ranks)
        key = (group, ranks, number)
        meeting = self.world.join(self.rank, key, header, chunks or silent, sizes or [0] * len(ranks))
        own = ranks.index(self.rank)

        def wait() -> list[Tensor]:
            self.world.wait(self.rank, meeting)
            return [meeting.brought[rank][own].clone() for rank in ranks]

        return wait


def run(world_size: int, function: Callable[[Simulated], T], timeout: float = 120.0) -> list[T]:
    """Runs a function on every rank of a new world and returns the results in the order of ranks.

    Raises:
        BaseException: the first failure of any rank; the others end with an AssertionError that tells of it.
    """
    results, failures = run_all(world_size, function, timeout)
    if failures:
        raise next(iter(failures.values()))
    return [results[rank] for rank in range(world_size)]


def run_all(
    world_size: int, function: Callable[[Simulated], T], timeout: float = 120.0
) -> tuple[dict[int, T], dict[int, BaseException]]:
    """Runs a function on every rank, and returns the results and the failures by rank, the first failure first."""
    world = World(world_size, timeout)
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}

    def main(rank: int) -> None:
        failure = None
        try:
            results[rank] = function(Simulated(world, rank))
        except BaseException as error:
            failures[rank] = error
            failure = f"rank {rank} failed: {type(error).__name__}: {error}"
        world.end(rank, failure)

    threads = [threading.Thread(target=main, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not failures:
        world.check_complete()
    return results, failures
