"""A bound from held-out data: k errors in m independent demands of the operational profile (Clopper–Pearson).

With confidence θ = 1 − δ the probability of failure is at most the ε at which k or fewer errors in m have the
probability δ; ε is the 1 − δ quantile of Beta(k + 1, m − k). Taken over as a belief, it is Pr(pfd ≤ ε) = θ.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta

from kaisa.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class HeldOut:
    """How a network did on data that had no part in making it.

    Attributes:
        errors: k.
        tests: m.
        belief: the confidence θ.
    """

    errors: int
    tests: int
    belief: float = 0.95

    def __post_init__(self) -> None:
        check_counts(self.errors, self.tests)
        check_belief(self.belief)

    @property
    def value(self) -> float:
        """The upper bound ε on the probability of failure per demand."""
        return upper_bound(self.errors, self.tests, self.belief)

    @property
    def quantile(self) -> tuple[float, float] | None:
        """(ε, θ), or None where the bound says nothing."""
        return (self.value, self.belief) if self.value < 1 else None

    @property
    def statement(self) -> str:
        """What it shows."""
        return (
            f"{self.errors} of {self.tests} held-out demands failed: at most {self.value:.3g} a demand, "
            f"with confidence {self.belief:g}"
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must hold."""
        return (
            "The held-out demands are independent draws of the operational profile.",
            "Nothing about the network was chosen by them, and they do not count again as operation.",
            f"A confidence of {self.belief:g} before the test is taken over as a belief after it.",
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
