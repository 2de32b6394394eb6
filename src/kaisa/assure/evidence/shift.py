"""Whether new data still come from the profile that the evidence speaks of.

Where they do not, failure-free demands of the old profile say nothing about the new one. Two tests, neither of which
needs labels:

    counts      χ² of two rows of counts, by cells of `kaisa.assure.evidence.partition`
    features    the maximum mean discrepancy of two samples with a Gaussian kernel, against permutations of the two
                (Gretton et al. 2012)

A small p-value is a reason to stop. A large one is no proof: the test may be too weak to see the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import chi2_contingency
from torch import Tensor

from kaisa.errors import ConfigurationError, DataError

LEVEL = 0.01
FEWEST = 20  # inputs of a sample


@dataclass(frozen=True)
class ShiftTest:
    """The result of a test of shift.

    Attributes:
        p_value: how often so large a difference arises by chance without a shift.
        statistic: χ², or the squared discrepancy.
        method: "counts" or "features".
        level: below which a shift is claimed.
        inputs: of the profile and of the new data.
    """

    p_value: float
    statistic: float
    method: str
    level: float
    inputs: tuple[int, int]

    @property
    def has_shifted(self) -> bool:
        """Whether the new data are from another profile."""
        return self.p_value < self.level

    @property
    def value(self) -> float:
        """The p-value."""
        return self.p_value

    @property
    def quantile(self) -> tuple[float, float] | None:
        """None: it is no bound on failures."""
        return None

    @property
    def statement(self) -> str:
        """What it shows."""
        verdict = "differ" if self.has_shifted else "show no difference"
        old, new = self.inputs
        return f"{new} new inputs {verdict} from {old} of the profile by {self.method} (p = {self.p_value:.3g})"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        return (
            "Both samples are of independent inputs.",
            "No shift was found, which is weaker than that there is none: small samples hide small shifts.",
        )


def compare_counts(profile: Sequence[int], new: Sequence[int], *, level: float = LEVEL) -> ShiftTest:
    """Test whether two rows of counts, by the same cells, come from one profile.

    Raises:
        DataError: rows of different lengths, negative counts, or too few inputs.
        ConfigurationError: the level is none.
    """
    _check_level(level)
    if len(profile) != len(new) or min(*profile, *new, 0) < 0:
        raise DataError(f"{len(profile)} and {len(new)} cells; give counts from 0 on of the same cells")
    _check_sizes(sum(profile), sum(new))
    seen = [(a, b) for a, b in zip(profile, new, strict=True) if a + b]
    sizes = (sum(profile), sum(new))
    if len(seen) < 2:
        return ShiftTest(1.0, 0.0, "counts", level, sizes)
    found = chi2_contingency(list(zip(*seen, strict=True)), correction=False)
    return ShiftTest(float(found.pvalue), float(found.statistic), "counts", level, sizes)


def compare_features(
    profile: Tensor, new: Tensor, *, permutations: int = 500, level: float = LEVEL, seed: int = 0
) -> ShiftTest:
    """Test whether two samples of features (inputs, …) come from one profile.

    The kernel is as wide as the median distance. Takes (a + b)² numbers of memory.

    Args:
        profile: features of the profile, say of the layer before the last.
        new: features of new data.
        permutations: the p-value is no smaller than 1 / (permutations + 1).
        level: below which a shift is claimed.
        seed: of the permutations.

    Raises:
        DataError: features of different sizes, not finite, or of too few inputs.
        ConfigurationError: the level is none, or one that so few permutations cannot reach.
    """
    _check_level(level)
    if permutations + 1 < 1 / level:
        raise ConfigurationError(f"{permutations} permutations reach no level of {level:g}; give {round(1 / level)}")
    a, b = profile.detach().flatten(1).double(), new.detach().flatten(1).double()
    if a.shape[1] != b.shape[1]:
        raise DataError(f"{a.shape[1]} features of the profile and {b.shape[1]} of the new data; give the same")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DataError("the features are not finite; look at the model and its inputs")
    _check_sizes(len(a), len(b))
    both = torch.cat((a, b))
    squared = torch.cdist(both, both).square()
    width = squared[~torch.eye(len(both), dtype=torch.bool, device=both.device)].median().clamp(min=1e-300)
    kernel = (-squared / width).exp().fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    signs = (
        torch.stack(
            [torch.arange(len(both))] + [torch.randperm(len(both), generator=generator) for _ in range(permutations)]
        )
        .lt(len(a))
        .to(kernel)
    )
    found = _discrepancies(kernel, signs, len(a), len(b))
    exceeding = int((found[1:] >= found[0] - 1e-12).sum())
    return ShiftTest((exceeding + 1) / (permutations + 1), float(found[0]), "features", level, (len(a), len(b)))


def _discrepancies(kernel: Tensor, is_first: Tensor, a: int, b: int) -> Tensor:
    """Return the unbiased squared discrepancy for each way to deal out the inputs (ways, inputs)."""
    others = 1 - is_first
    within_a = ((is_first @ kernel) * is_first).sum(1) / (a * (a - 1))
    within_b = ((others @ kernel) * others).sum(1) / (b * (b - 1))
    between = ((is_first @ kernel) * others).sum(1) / (a * b)
    return within_a + within_b - 2 * between


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigurationError(f"level is {level:g}; give a probability, such as {LEVEL}")


def _check_sizes(old: int, new: int) -> None:
    if min(old, new) < FEWEST:
        raise DataError(f"{old} inputs of the profile and {new} new ones; a test needs at least {FEWEST} of each")
