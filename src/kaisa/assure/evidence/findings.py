"""What every kind of evidence says of itself, and how it enters a safety case."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date
from typing import Protocol

from torch import Tensor

from kaisa.assure.exhibits import Exhibit


class Finding(Protocol):
    """A result that may be cited."""

    @property
    def statement(self) -> str:
        """What it shows, a sentence."""

    @property
    def value(self) -> float:
        """Its figure."""

    @property
    def quantile(self) -> tuple[float, float] | None:
        """(ε, θ) of the prior knowledge Pr(pfd ≤ ε) = θ that it justifies, or None."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold for it to mean what it says."""


def present(
    finding: Finding,
    *,
    name: str,
    command: str,
    data: Mapping[str, str] | None = None,
    inputs: frozenset[str] = frozenset(),
    on: str | None = None,
) -> Exhibit:
    """Return a finding as a piece of evidence for a case.

    Args:
        finding: any result of this package.
        name: unique in the case.
        command: what made it.
        data: SHA-256 of the data files that it used up, by name.
        inputs: those of the single inputs (`digest_inputs`).
        on: the date in ISO form; today unless given.
    """
    return Exhibit(
        name=name,
        statement=finding.statement,
        value=finding.value,
        command=command,
        date=on or date.today().isoformat(),
        quantile=finding.quantile,
        at_most=getattr(finding, "at_most", None),
        data=dict(data or {}),
        inputs=inputs,
        assumptions=finding.assumptions,
    )


def digest_inputs(inputs: Tensor) -> frozenset[str]:
    """Return the SHA-256 of each input (first dimension); see `digest_input`."""
    return frozenset(digest_input(row) for row in inputs)


def digest_input(row: Tensor) -> str:
    """Return the SHA-256 of one input: its shape, its type and its numbers."""
    row = row.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(row.shape)} {row.dtype}".encode() + row.numpy().tobytes()).hexdigest()
