"""RSG, remote stochastic gradient: momentum that takes the gradient at a remote observation point.

    m ← β m + (1 − β) g
    x ← x − α [(1 − μ) m + μ g]

This is heavy ball, y ← y − α m, with the gradient taken at x = y − η α m instead of y, where μ = η (1 − β) / β;
written for x it costs what momentum costs. With torch's lr α (1 − β), μ = 0 is momentum SGD and μ = 1 − β Nesterov's;
any μ is QHM with ν = 1 − μ. It is stable on a quadratic while α λ < 2 (1 + β) / (1 − β + 2 β μ); see
`kaisa.optim.gain`.

Source: arXiv 1905.01422.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kaisa.optim.elementwise import ElementwiseOptimizer, Group, Run, check_number
from kaisa.optim.operations import Operations, Tensors
from kaisa.schedules import DECAY


def rsg_(xs: Tensors, gs: Tensors, ms: Tensors, *, lr: float, beta: float, mu: float, operations: Operations) -> None:
    """Take a step of RSG with every parameter x, gradient g and momentum m of the lists."""
    operations.mix_(ms, gs, 1 - beta)
    operations.add_(xs, ms, -lr * (1 - mu))
    if mu:
        operations.add_(xs, gs, -lr * mu)


@final
class RSG(ElementwiseOptimizer):
    """Momentum SGD with an observation factor (arXiv 1905.01422).

    Example:
        >>> optimizer = kaisa.optim.RSG(model.parameters(), lr=0.2)
        >>> loss.backward()
        >>> optimizer.step()

    Args:
        params: parameters, or groups of them with options of their own.
        lr: the step size α of the whole average: torch's SGD with momentum β calls α (1 - β) its lr.
        beta: decay β of the momentum, from 0 to below 1.
        mu: observation factor μ, from 0 to below 1: the weight of the gradient beside the momentum.
        weight_decay: λ; λ x is added to the gradient.
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
        lr: float,
        beta: float = 0.999,
        mu: float = 0.1,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        lookahead_steps: int | None = None,
        lookahead_share: float = 0.5,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "mu": mu,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lookahead_steps": lookahead_steps,
            "lookahead_share": lookahead_share,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_number("beta", group["beta"], DECAY)
        check_number("mu", group["mu"], DECAY)

    def _remember(self, x: Tensor, group: Group) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(x)}

    def _update_(self, run: Run, group: Group, operations: Operations) -> None:
        ms = run.remembered("exp_avg")
        rsg_(run.xs, run.gs, ms, lr=group["lr"], beta=group["beta"], mu=group["mu"], operations=operations)
