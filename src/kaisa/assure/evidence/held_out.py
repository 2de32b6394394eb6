"""A bound from held-out data: k errors in m independent demands of the operational profile (Clopper–Pearson).

With confidence θ = 1 − δ the probability of failure is at most the ε at which k or fewer errors in m have the
probability δ; ε is the 1 − δ quantile of Beta(k + 1, m − k). Taken over as a belief, it is Pr(pfd ≤ ε) = θ.

Of both sides each gets δ/2: Pr(pfd ≤ ε) = 1 − δ/2 and Pr(pfd ≤ α) ≤ δ/2, α the δ/2 quantile of Beta(k, m − k + 1).
Jointly they are a belief of at least 1 − δ in (α, ε]. The lower one is no belief that the network *is* as good as α,
only that it is hardly better: a prior with no mass there agrees with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta

from kaisa.assure.exhibits import SIDES, Sides
from kaisa.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class HeldOut:
    """How a network did on data that had no part in making it.

    Attributes:
        errors: k.
        tests: m.
        belief: the confidence θ; of both sides together, if both are asked for.
        sides: "upper" for an upper bound alone, "both" for a lower one as well. To be fixed before the test.
    """

    errors: int
    tests: int
    belief: float = 0.95
    sides: Sides = "upper"

    def __post_init__(self) -> None:
        check_counts(self.errors, self.tests)
        check_belief(self.belief)
        if self.sides not in SIDES:
            raise ConfigurationError(f"sides is {self.sides!r}; choose from {', '.join(SIDES)}")

    @property
    def doubt(self) -> float:
        """The belief that is left for what lies beyond each bound."""
        return (1 - self.belief) / (2 if self.sides == "both" else 1)

    @property
    def value(self) -> float:
        """The upper bound ε on the probability of failure per demand."""
        return upper_bound(self.errors, self.tests, 1 - self.doubt)

    @property
    def least(self) -> float:
        """The lower bound; 0 if none was asked for."""
        return lower_bound(self.errors, self.tests, 1 - self.doubt) if self.sides == "both" else 0.0

    @property
    def quantile(self) -> tuple[float, float] | None:
        """(ε, θ): Pr(pfd ≤ ε) = θ, or None where the bound says nothing."""
        return (self.value, 1 - self.doubt) if self.value < 1 else None

    @property
    def at_most(self) -> tuple[float, float] | None:
        """(α, η): Pr(pfd ≤ α) ≤ η, or None where the lower bound says nothing."""
        return (self.least, self.doubt) if self.least > 0 else None

    @property
    def statement(self) -> str:
        """What it shows."""
        bounds = f"from {self.least:.3g} to {self.value:.3g}" if self.sides == "both" else f"at most {self.value:.3g}"
        return (
            f"{self.errors} of {self.tests} held-out demands failed: {bounds} a demand, with confidence {self.belief:g}"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        usual = (
            "The held-out demands are independent draws of the operational profile.",
            "Nothing about the network was chosen by them, and they do not count again as operation.",
            f"A confidence of {self.belief:g} before the test is taken over as a belief after it.",
        )
        if self.sides == "upper":
            return usual
        return (
            *usual,
            f"The rest is split evenly, {self.doubt:g} above the upper bound and at most {self.doubt:g} below the "
            f"lower one, so that the belief in what lies between is at least {self.belief:g}.",
        )


def upper_bound(errors: int, tests: int, belief: float = 0.95) -> float:
    """Return Clopper and Pearson's upper bound on a probability, 1 where every test failed.

    Args:
        errors: how many tests failed.
        tests: how many there were; without any the bound is 1.
        belief: the confidence, above 0 and below 1.

    Raises:
        DataError: more errors than tests, or a negative count.
        ConfigurationError: the belief is no confidence.
    """
    check_counts(errors, tests)
    check_belief(belief)
    return 1.0 if errors == tests else float(beta.isf(1 - belief, errors + 1, tests - errors))


def lower_bound(errors: int, tests: int, belief: float = 0.95) -> float:
    """Return Clopper and Pearson's lower bound on a probability; see `upper_bound`."""
    check_counts(errors, tests)
    check_belief(belief)
    return 0.0 if errors == 0 else float(beta.ppf(1 - belief, errors, tests - errors + 1))


def check_counts(errors: int, tests: int) -> None:
    """Refuse counts that cannot be.

    Raises:
        DataError: more errors than tests, or a negative count.
    """
    if not 0 <= errors <= tests:
        raise DataError(f"{errors} errors in {tests} tests; count again")


def check_belief(belief: float) -> None:
    """Refuse a confidence that is none.

    Raises:
        ConfigurationError: it is not above 0 and below 1.
    """
    if not 0 < belief < 1:
        raise ConfigurationError(f"belief is {belief:g}; give a confidence above 0 and below 1, such as 0.95")
