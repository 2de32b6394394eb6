"""What the commands that run on several processes share: who takes part, one refusal for all, one interruption.

Of several ranks the first prints and writes. A refusal is said by one rank, and all leave.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

from kaisa.errors import ConfigurationError, KaisaError
from kaisa.kfac.collectives import Alone, Collectives, absent_ranks_named, join_world, launched_world, leave_world

Prepared = TypeVar("Prepared")


class RefusedElsewhere(KaisaError):
    """Another rank has said why nothing starts."""


def count_ranks(nproc: int | None) -> int:
    """Return how many processes take part: those that torchrun has started, or those that are asked for."""
    launched = launched_world()
    if launched is None:
        return 1 if nproc is None else nproc
    if nproc not in (None, launched[1]):
        raise ConfigurationError(
            f"nproc is {nproc}, but torchrun has started {launched[1]} processes; leave out --nproc"
        )
    return launched[1]


@contextmanager
def together(nproc: int, device: str) -> Iterator[Collectives]:
    """Join the other ranks for a while; alone where there are none."""
    try:
        ranks = join_world(torch.device(device)) if nproc > 1 else Alone()
        with absent_ranks_named():
            yield ranks
    finally:
        leave_world()


def agreed(ranks: Collectives, prepare: Callable[[], Prepared]) -> Prepared:
    """Prepare on every rank; if one refuses all do, and the first of those that do says why."""
    refusal: KaisaError | None = None
    prepared: Prepared | None = None
    try:
        prepared = prepare()
    except KaisaError as error:
        refusal = error
    own = torch.zeros(ranks.world_size)
    own[ranks.rank] = refusal is not None
    device = torch.device("cuda" if torch.cuda.is_available() and ranks.world_size > 1 else "cpu")
    refusing = ranks.total("refusals", tuple(range(ranks.world_size)), own.to(device)).nonzero().flatten().tolist()
    if refusal is not None and ranks.rank == refusing[0]:
        raise refusal
    if refusing or prepared is None:
        raise RefusedElsewhere
    return prepared


@contextmanager
def interruptible() -> Iterator[None]:
    """Make one interruption of however many signals: torchrun repeats to its ranks what the terminal told them too.

    What fails afterwards, because another rank has left, is part of the interruption.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (KaisaError, RuntimeError) as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
