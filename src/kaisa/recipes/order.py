"""In which order examples come: a pure function of seed and epoch, of which each rank takes its part.

Two contestants with one seed see the same batches bit for bit, and a resumed run sees what the
uninterrupted one would have seen, without a generator state to keep. What is random is drawn for the whole
batch before it is shared, so that the number of ranks does not show.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the source of all that is random in an epoch, which is counted from 0."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def whole_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of whole batches; the examples that fill none wait for another epoch."""
    order = torch.randperm(count, generator=generator)
    yield from order[: count // size * size].split(size)


def part_of(batch: Tensor, rank: int, ranks: int) -> Tensor:
    """Return a rank's part of a batch, which is one of equal parts."""
    size = len(batch) // ranks
    return batch[rank * size : (rank + 1) * size]
