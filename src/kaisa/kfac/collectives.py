"""The only file that imports torch.distributed.

K-FAC communicates in two ways, both among a tuple of ranks:

    exchange   every rank sends every other its own chunk; a reduce-scatter is an exchange followed by a local sum, in
               full precision and in the order of ranks, so that all worlds add in the same order
    total      a small tensor is summed; every rank gets the sum

Both return a function that waits for the result, so that work can go on meanwhile. A communicator takes ranks, never a
group handle, and counts what it sends by kind.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kaisa.errors import CollectiveError

Wait = Callable[[], list[Tensor]]


class Collectives(ABC):
    """What a rank can ask of the others.

    Attributes:
        rank, world_size: which of how many.
        bytes_sent: bytes that left this rank, by kind.
        calls: collectives that this rank took part in, by kind.
    """

    rank: int = 0
    world_size: int = 1

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def prepare(self, groups: Iterable[tuple[int, ...]]) -> None:  # noqa: B027 - most need no preparation
        """Makes ready for sets of ranks that will communicate; all ranks call it with the same."""

    def exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        """Sends ``chunks[i]`` to ``ranks[i]``; the wait returns what came from each of them, its own chunk included.

        Args:
            kind: what is sent, for the account and for error messages.
            ranks: who takes part, sorted; every one of them calls with the same.
            chunks: flat tensors of one type.
            sizes: how many numbers come from each rank, known to all beforehand.
        """
        own = ranks.index(self.rank)
        if len(ranks) == 1:
            return lambda: [chunks[0]]
        self.bytes_sent[kind] += sum(chunk.nbytes for index, chunk in enumerate(chunks) if index != own)
        self.calls[kind] += 1
        return self._exchange(kind, ranks, chunks, sizes)

    def total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over ranks."""
        if len(ranks) == 1:
            return tensor
        self.bytes_sent[kind] += tensor.nbytes
        self.calls[kind] += 1
        return self._total(kind, ranks, tensor)

    @abstractmethod
    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait: ...

    @abstractmethod
    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor: ...


class Alone(Collectives):
    """One process: there is nobody to send to."""

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        raise AssertionError("one rank has nobody to exchange with")

    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        raise AssertionError("one rank has nobody to add to")


class Processes(Collectives):
    """``torch.distributed``: one group for each set of ranks, made once, by all ranks, in sorted order.

    Args:
        groups: all sets of ranks that will ever communicate.
        timeout: how long to wait for another rank; None for torch's own.
    """

    def __init__(self, groups: Iterable[tuple[int, ...]], timeout: datetime.timedelta | None = None) -> None:
        super().__init__()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.prepare(groups)

    @classmethod
    def of_world(cls) -> Processes:
        """Returns a communicator of all ranks that makes the groups of a grid when they are first needed."""
        return cls([tuple(range(dist.get_world_size()))])

    def prepare(self, groups: Iterable[tuple[int, ...]]) -> None:
        for ranks in sorted(set(groups) - set(self._groups)):
            if len(ranks) > 1:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self._timeout)

    def _exchange(self, kind: str, ranks: tuple[int, ...], chunks: Sequence[Tensor], sizes: Sequence[int]) -> Wait:
        sent = torch.cat(list(chunks))
        received = sent.new_empty(sum(sizes))
        work = self._run(
            kind,
            ranks,
            lambda group: dist.all_to_all_single(
                received, sent, list(sizes), [chunk.numel() for chunk in chunks], group=group, async_op=True
            ),
        )

        def wait() -> list[Tensor]:
            self._run(kind, ranks, lambda group: work.wait())
            return list(received.split(list(sizes)))

        return wait

    def _total(self, kind: str, ranks: tuple[int, ...], tensor: Tensor) -> Tensor:
        result = tensor.clone()
        self._run(kind, ranks, lambda group: dist.all_reduce(result, group=group))
        return result

    def _run(self, kind: str, ranks: tuple[int, ...], operation: Callable[[dist.ProcessGroup], Any]) -> Any:
        try:
            return operation(self._groups[ranks])
        except (RuntimeError, dist.DistError) as error:
            raise CollectiveError(
                f"rank {self.rank} could not exchange {kind} with ranks {ranks}: {_first_line(error)}; "
                "one of them has failed or is late, look at its own error"
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


def world() -> tuple[int, int]:
    """Returns (rank, world size) of the running process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
