"""ARSG, adaptive remote stochastic gradient: RSG divided by the root of a second moment.

    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    AMSGrad-type:  v̂ ← max(v̂, v), at first ε      x ← x − α [(1 − μ) m + μ g] / √v̂
    Adam-type:     m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)      x ← x − α [(1 − μ) m̂ + μ g] / (√v̂ + ε)

The AMSGrad-type corrects no bias: its first step has size α [(1 − μ)(1 − β₁) + μ] / √(1 − β₂), about 1.009 α unless
options say otherwise. Its ε is a floor under v̂, so √ε one under the denominator. The Adam-type with μ = 0 is Adam, with
any μ QHAdam with ν₁ = 1 − μ, ν₂ = 1.

Source: arXiv 1905.01422, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kaisa.errors import ConfigurationError
from kaisa.optim.elementwise import ElementwiseOptimizer, Group, Run, check_flag, check_number
from kaisa.optim.operations import Operations, Tensors
from kaisa.schedules import DECAY, NON_NEGATIVE

Betas = tuple[float, float]

FINE = 1e-3
"""The ε of the fine mode, for better generalisation: no weight moves by more than about 30 times lr · gradient."""


def arsg_(
    xs: Tensors,
    gs: Tensors,
    ms: Tensors,
    vs: Tensors,
    peaks: Tensors,
    *,
    lr: float,
    betas: Betas,
    mu: float,
    operations: Operations,
) -> None:
    """Take a step of the AMSGrad-type: parameter x, gradient g, moments m and v, and the peak v̂ of v."""
    _average_(gs, ms, vs, betas, operations)
    operations.maximum_(peaks, vs)
    operations.add_quotient_(xs, operations.mix(ms, gs, mu), operations.root(peaks), -lr)


def arsg_adam_(
    xs: Tensors,
    gs: Tensors,
    ms: Tensors,
    vs: Tensors,
    steps: Sequence[int],
    *,
    lr: float,
    betas: Betas,
    mu: float,
    eps: float,
    operations: Operations,
) -> None:
    """Take a step of the Adam-type, the step-th of each parameter.

    Numerator and denominator are multiplied by √(1 - β₂ᵗ), which spares a pass over v.
    """
    _average_(gs, ms, vs, betas, operations)
    roots = [(1 - betas[1] ** step) ** 0.5 for step in steps]
    observed = operations.multiply(ms, [(1 - mu) / (1 - betas[0] ** step) for step in steps])
    if mu:
        operations.add_(observed, gs, mu)
    denominators = operations.root(vs)
    operations.shift_(denominators, [eps * root for root in roots])
    operations.add_quotient_(xs, observed, denominators, [-lr * root for root in roots])


def _average_(gs: Tensors, ms: Tensors, vs: Tensors, betas: Betas, operations: Operations) -> None:
    operations.mix_(ms, gs, 1 - betas[0])
    operations.multiply_(vs, betas[1])
    operations.add_product_(vs, gs, gs, 1 - betas[1])


@final
class ARSG(ElementwiseOptimizer):
    """AMSGrad or Adam with an observation factor (arXiv 1905.01422).

    Example:
        >>> optimizer = kaisa.optim.ARSG(model.parameters(), lr=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Args:
        params: parameters, or groups of them with options of their own.
        lr: step size α, about the change of a weight in the first step.
        betas: decays (β₁, β₂) of the two moments, from 0 to below 1.
        mu: observation factor μ, from 0 to below 1: the weight of the gradient beside the momentum.
        eps: AMSGrad-type: what v̂ starts from, in force when a parameter takes its first step and at `restart`; `FINE`
            (1e-3) for the fine mode. Adam-type: added to the denominator.
        weight_decay: λ; λ x is added to the gradient.
        preconditioner: "amsgrad", which never forgets a large gradient (but see `restart`), or "adam".
        decoupled_weight_decay: shrink x by lr · λ a step instead.
        lookahead_steps: steps between two returns to a slow average of the weights; None for none.
        lookahead_share: how far the slow average goes towards the weights each time, from 0 to 1.
        maximize: go up instead of down.
        foreach: update lists of tensors at once; None for wherever the tensors are plain ones.

    Raises:
        ConfigurationError: an option is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Betas = (0.999, 0.99),
        mu: float = 0.1,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preconditioner: str = "amsgrad",
        decoupled_weight_decay: bool = False,
        lookahead_steps: int | None = None,
        lookahead_share: float = 0.5,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "mu": mu,
            "eps": eps,
            "weight_decay": weight_decay,
            "preconditioner": preconditioner,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lookahead_steps": lookahead_steps,
            "lookahead_share": lookahead_share,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigurationError(f"betas is {betas!r}; give two numbers, such as (0.999, 0.99)")
        check_number("the first of betas", betas[0], DECAY)
        check_number("the second of betas", betas[1], DECAY)
        check_number("mu", group["mu"], DECAY)
        check_number("eps", group["eps"], NON_NEGATIVE)
        check_flag("preconditioner", group["preconditioner"], "amsgrad", "adam")

    def _remember(self, x: Tensor, group: Group) -> dict[str, Tensor]:
        moments = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
        if group["preconditioner"] == "adam":
            return moments
        return {**moments, "max_exp_avg_sq": torch.full_like(x, _floor(x, group))}

    def _update_(self, run: Run, group: Group, operations: Operations) -> None:
        ms, vs = run.remembered("exp_avg"), run.remembered("exp_avg_sq")
        lr, betas, mu, eps = group["lr"], group["betas"], group["mu"], group["eps"]
        if group["preconditioner"] == "amsgrad":
            peaks = run.remembered("max_exp_avg_sq")
            arsg_(run.xs, run.gs, ms, vs, peaks, lr=lr, betas=betas, mu=mu, operations=operations)
            return
        eps = eps or torch.finfo(run.xs[0].dtype).tiny  # a parameter whose gradient was always 0 stays where it is
        arsg_adam_(run.xs, run.gs, ms, vs, run.steps, lr=lr, betas=betas, mu=mu, eps=eps, operations=operations)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the highest second moments: v̂ becomes max(v, ε), as it is useful when the gradients have shrunk.

        Raises:
            ConfigurationError: no group is of the AMSGrad-type, which alone remembers them.
        """
        groups = [group for group in self.param_groups if group["preconditioner"] == "amsgrad"]
        if not groups:
            raise ConfigurationError(
                "restart() forgets the highest second moments, which preconditioner='adam' does not keep; leave it "
                "out, or give preconditioner='amsgrad'"
            )
        for group in groups:
            for state in (self.state[parameter] for parameter in group["params"] if self.state.get(parameter)):
                v = state["exp_avg_sq"]
                torch.clamp(v, min=_floor(v, group), out=state["max_exp_avg_sq"])


def _floor(x: Tensor, group: Group) -> float:
    """Return what v̂ is at least: ε, above zero even for ε = 0, for 0 / 0 must be no step."""
    return max(float(group["eps"]), torch.finfo(x.dtype).tiny)
