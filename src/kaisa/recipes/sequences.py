"""Sequences of tokens, to foretell each next one or to find the hidden ones.

    next      inputs  t₀ t₁ t₂ …      hidden    inputs  t₀ ▒ t₂ t₃ ▒ …     ▒: 80 % hidden, 10 % another token at random,
              targets t₁ t₂ t₃ …                targets –  t₁ – –  t₄ …       10 % itself (Devlin et al. 2019)

An epoch cuts the text into sequences from a start that is drawn anew, so that cuts move. As many tokens are hidden in
each sequence, so that the loss of every batch has as many terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.recipes.order import epoch_generator, part_of, whole_batches
from kaisa.recipes.tasks import IGNORED, Example
from kaisa.recipes.text import SPECIAL, Vocabulary

CPU = torch.device("cpu")
HIDDEN_SHARE = 0.15


@dataclass(frozen=True)
class Sequences:
    """The sequences of every epoch.

    Attributes:
        tokens: the text to learn from, of shape (tokens,).
        vocabulary: what the numbers mean.
        positions: of a sequence.
        size: sequences in a batch, of all ranks together.
        is_masked: whether hidden tokens are predicted, and not each next one.
        seed: of order, cuts and hidden tokens.
        device: where the batches are used.
        rank, ranks: which of how many equal parts of each batch is yielded; ``ranks`` divides the size.
    """

    tokens: Tensor
    vocabulary: Vocabulary
    positions: int
    size: int
    is_masked: bool
    seed: int
    device: torch.device = CPU
    rank: int = 0
    ranks: int = 1

    @property
    def count(self) -> int:
        """How many sequences an epoch may have from whatever start."""
        return len(self.tokens) // self.positions - 1

    def __len__(self) -> int:
        return self.count // self.size

    @property
    def terms(self) -> int:
        """Predicted tokens in one batch of this rank."""
        predicted = hidden_count(self.positions) if self.is_masked else self.positions
        return self.size // self.ranks * predicted

    def epoch(self, number: int) -> Iterator[Example]:
        """Yield inputs and targets (batch, positions) of one epoch, counted from 0."""
        generator = epoch_generator(self.seed, number)
        start = int(torch.randint(self.positions, (), generator=generator))
        for rows in whole_batches(self.count, self.size, generator):
            windows = _windows(self.tokens, start + rows * self.positions, self.positions + 1)
            inputs, targets = self._pose(windows, generator)
            yield self._part(inputs), self._part(targets)

    def _pose(self, windows: Tensor, generator: torch.Generator) -> Example:
        if self.is_masked:
            return hide(windows[:, :-1], self.vocabulary, generator)
        return windows[:, :-1], windows[:, 1:]

    def _part(self, batch: Tensor) -> Tensor:
        return part_of(batch, self.rank, self.ranks).to(self.device)


@dataclass(frozen=True)
class TestSequences:
    """The text that is tested on, cut from its beginning; hidden are the same tokens each time.

    Attributes:
        tokens: of shape (tokens,).
        vocabulary: what the numbers mean.
        positions: of a sequence.
        size: sequences at once.
        is_masked: whether hidden tokens are predicted, and not each next one.
        device: where the batches are used.
    """

    __test__ = False

    tokens: Tensor
    vocabulary: Vocabulary
    positions: int
    size: int
    is_masked: bool
    device: torch.device = CPU

    def __iter__(self) -> Iterator[Example]:
        generator = torch.Generator().manual_seed(0)
        starts = torch.arange(0, len(self.tokens) - self.positions, self.positions)
        for rows in starts.split(self.size):
            windows = _windows(self.tokens, rows, self.positions + 1)
            if self.is_masked:
                inputs, targets = hide(windows[:, :-1], self.vocabulary, generator)
            else:
                inputs, targets = windows[:, :-1], windows[:, 1:]
            yield inputs.to(self.device), targets.to(self.device)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(length)].long()


def hidden_count(positions: int) -> int:
    """Return how many tokens of a sequence are to be found."""
    return max(1, round(HIDDEN_SHARE * positions))


def hide(tokens: Tensor, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
    """Hide tokens at random; return what is left (batch, positions), and the hidden ones among `IGNORED`.

    Args:
        tokens: of shape (batch, positions).
        vocabulary: has the token that hides others.
        generator: decides which, and how.
    """
    places = torch.rand(tokens.shape, generator=generator).argsort(1)[:, : hidden_count(tokens.shape[1])]
    fates = torch.rand(places.shape, generator=generator)
    others = torch.randint(SPECIAL, len(vocabulary), places.shape, generator=generator)
    true = tokens.gather(1, places)
    shown = torch.where(fates < 0.8, torch.full_like(true, vocabulary.hidden), torch.where(fates < 0.9, others, true))
    targets = torch.full_like(tokens, IGNORED).scatter(1, places, true)
    return tokens.scatter(1, places, shown), targets
