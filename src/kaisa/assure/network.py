"""What a safety case asks of a frozen network that it can run itself, and how its answers are judged.

The network may come from anywhere; `kaisa.recipes.demands` makes one of a run of `kaisa train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from kaisa.errors import ConfigurationError

DECLINED = "(declined)"
"""What a network says where it leaves the answer to a person, which is no failure."""
UNDEFINED = "(not a number)"
"""What it says where its output is none, which is a failure: it has not declined."""


@dataclass(frozen=True)
class Criterion:
    """When a demand has failed, beyond a wrong class.

    Attributes:
        sure: of classifiers: the probability of its answer below which the system declines; None for answers always.
        dice: of masks: an image fails whose Dice is below.
        loss: of text: a sequence fails whose mean loss, in nats a token, is above.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    sure: float | None = None
    dice: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("sure", self.sure), ("dice", self.dice)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigurationError(f"{name} is {value:g}; give a number from 0 to 1")
        if self.loss is not None and not self.loss > 0:
            raise ConfigurationError(f"loss is {self.loss:g}; give one above 0, in nats a token")

    @property
    def given(self) -> dict[str, float]:
        """What is said of it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}

    def describe(self) -> str:
        """Return what is said of it, in words; nothing for nothing."""
        return ", ".join(f"{name} {value:.15g}" for name, value in self.given.items())


@dataclass(frozen=True)
class Demand:
    """One input that the network was tried out on.

    Attributes:
        input: SHA-256 of what it saw.
        failed: by the criterion.
        prediction: what it said, of classifiers.
        truth: what was right, of classifiers.
    """

    input: str
    failed: bool
    prediction: str = ""
    truth: str = ""


class Network(Protocol):
    """A frozen network that can be run."""

    @property
    def weights(self) -> Path:
        """The file that changes when the network does."""

    @property
    def criterion(self) -> Criterion:
        """When a demand has failed."""

    def try_out(self, data: Path | None) -> Sequence[Demand]:
        """Run it on data of its own kind, or on what its run was tested on.

        Raises:
            KaisaError: the data cannot be read, or the criterion leaves open when it fails on them.
        """

    def learned(self) -> frozenset[str] | None:
        """Return the SHA-256 of each input that it has learned from; None where they cannot be told."""

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of what it would see of each file."""

    def answer(self, paths: Sequence[Path]) -> list[str]:
        """Return what it says to each file, `DECLINED` where it says nothing.

        Raises:
            KaisaError: a file cannot be read, or the network does not answer files by words.
        """
