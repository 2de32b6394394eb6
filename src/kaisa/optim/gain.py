"""How fast RSG shrinks an error on a quadratic, by formula (arXiv 1905.01422, section 3).

Along an eigenvector of eigenvalue λ, with τ = α λ, two steps of x are tied by r² − ρ r + β (1 − μ τ) = 0 with
ρ = 1 + β − τ (1 − β (1 − μ)). The *gain factor* is the larger |r|: what is left of an error after a step, in the long
run.

    τ:   0 ──── real ──── τ_cb1 ──── complex ──── τ_cb2 ──── real ──── bound
         gain 1    falls         √(β (1 − μ τ))         rises         gain 1

So the gain factor is smallest at τ_cb2. ARSG is RSG with α / √v̂ for α. Pure arithmetic, no tensors.
"""

from __future__ import annotations

import cmath
import math


def gain_factor(tau: float, beta: float, mu: float) -> float:
    """Return what a step leaves of an error along an eigenvector, in the long run.

    Args:
        tau: step size α times eigenvalue λ.
        beta: decay of the momentum.
        mu: observation factor.
    """
    rho = 1 + beta - tau * (1 - beta * (1 - mu))
    root = cmath.sqrt(rho**2 - 4 * beta * (1 - mu * tau))
    return max(abs(rho - root), abs(rho + root)) / 2


def stability_bound(beta: float, mu: float) -> float:
    """Return the τ = α λ at which RSG stops converging: 2 (1 + β) / (1 − β + 2 μ β)."""
    return 2 * (1 + beta) / (1 - beta + 2 * mu * beta)


def best_step(beta: float, mu: float) -> float:
    """Return the τ = α λ of the smallest gain factor: the end τ_cb2 of the complex region."""
    return (1 - beta) * (1 + beta - beta * mu + 2 * math.sqrt(beta * (1 - mu))) / (1 - beta + beta * mu) ** 2


def step_ratio(beta: float, mu: float, new_mu: float) -> float:
    """Return what to multiply the step size by when the observation factor changes: the ratio of the best steps."""
    return best_step(beta, new_mu) / best_step(beta, mu)
