"""How a model is optimised: an optimizer, alone or behind K-FAC."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.collectives import Collectives
from kaisa.kfac.coverage import unwrapped
from kaisa.kfac.layers import EXPAND, REDUCE
from kaisa.kfac.options import for_the_planner, one_of
from kaisa.kfac.placement import COMM_OPT
from kaisa.kfac.planner import parse_bytes
from kaisa.kfac.trust_region import FisherNorm
from kaisa.optim import ARSG, RSG, AdaHessian
from kaisa.schedules import DECAY, NON_NEGATIVE, POSITIVE, STEPS, Schedule

ADAHESSIAN = "adahessian"
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rsg": RSG,
    "arsg": ARSG,
    ADAHESSIAN: AdaHessian,
}
SOLVERS = ("eigen", "cholesky", "ekfac", "sqrt_ekfac")
WARM_UP = 0.05  # the share of the steps over which the learning rate rises


@dataclass(frozen=True)
class Preconditioning:
    """The options of K-FAC that the recipes offer; see `kaisa.KFACPreconditioner`.

    `sharing` is for weights that several positions share; a `kl_clip` of 0 is none, which a `fisher_norm`, the limit of
    `kaisa.kfac.FisherNorm`, needs beside it; a `memory_budget` is for a `grad_worker_fraction` of "auto"; `parts` are
    names of modules, divided by commas, to precondition those alone: roi_heads is also what stands inside any other
    module.

    Raises:
        ConfigurationError: an option is out of its range.
    """

    damping: float = 0.003
    factor_update_steps: int = 10
    inv_update_steps: int = 100
    factor_decay: float = 0.95
    kl_clip: float = 0.001
    fisher_norm: float | None = None
    solver: str = "eigen"
    sharing: str = EXPAND
    grad_worker_fraction: str | float = COMM_OPT
    memory_budget: str | None = None
    parts: str | None = None

    def __post_init__(self) -> None:
        for_the_planner(self.grad_worker_fraction, memory_budget=self.memory_budget)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        Schedule("damping", self.damping, POSITIVE)
        Schedule("factor-update-steps", self.factor_update_steps, STEPS)
        Schedule("inv-update-steps", self.inv_update_steps, STEPS)
        Schedule("factor-decay", self.factor_decay, DECAY)
        Schedule("kl-clip", self.kl_clip, NON_NEGATIVE)
        if self.fisher_norm is not None:
            Schedule("fisher-norm", self.fisher_norm, POSITIVE)
            if self.kl_clip:
                raise ConfigurationError(
                    f"kl-clip is {self.kl_clip} and fisher-norm {self.fisher_norm}, of which one alone bounds a step; "
                    "leave one out"
                )
        if self.solver not in SOLVERS:
            raise ConfigurationError(f"unknown solver {self.solver!r}; choose from {', '.join(SOLVERS)}")
        one_of("sharing", self.sharing, (EXPAND, REDUCE))


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its learning rate, alone or behind K-FAC.

    Attributes:
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: the highest of the schedule.
        momentum: of SGD; the others have their usual decays.
        weight_decay: decoupled in AdamW and AdaHessian, added to the gradient by the others.
        preconditioning: the options of K-FAC; None for the optimizer alone.

    AdaHessian behind K-FAC is refused. What K-FAC hands on is F⁻¹ g, already a step: divided by |H| again it would be
    H⁻¹ H⁻¹ g, small where the loss is curved and boundless where it is flat, in a unit that is no weight's. To do it
    right, H would have to be that of the coordinates in which K-FAC steps, F⁻¹ H, which is near the identity by design:
    what is left of AdaHessian there is momentum, which is sgd behind K-FAC. Adam and ARSG may stand behind it, for they
    measure the very gradients that they are given; RSG measures nothing.

    Raises:
        ConfigurationError: an option is out of its range, or AdaHessian stands behind K-FAC.
    """

    optimizer: str
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    preconditioning: Preconditioning | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigurationError(f"unknown optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        if self.optimizer == ADAHESSIAN and self.preconditioning is not None:
            raise ConfigurationError(
                "adahessian behind K-FAC would divide by the curvature twice; give --contestants first-order, or "
                "--optimizer sgd, adam, adamw, rsg or arsg"
            )
        Schedule("lr", self.learning_rate, POSITIVE)
        Schedule("weight-decay", self.weight_decay, NON_NEGATIVE)

    @property
    def name(self) -> str:
        """What the table and the plot call it."""
        return f"{self.optimizer} + K-FAC" if self.preconditioning else self.optimizer

    @property
    def slug(self) -> str:
        """What files call it."""
        return f"{self.optimizer}-kfac" if self.preconditioning else self.optimizer

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of a model's parameters."""
        options = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            options["momentum"] = self.momentum
        return OPTIMIZERS[self.optimizer](model.parameters(), **options)  # type: ignore[arg-type]

    def build_preconditioner(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        seed: int,
        ranks: Collectives | None = None,
        loss_terms: int | None = None,
    ) -> kaisa.KFACPreconditioner | None:
        """Make the preconditioner, or None for a first-order contestant.

        Args:
            model: what is trained, perhaps wrapped.
            optimizer: of its parameters.
            seed: of what is random.
            ranks: reaches the other processes.
            loss_terms: terms of the loss in one batch of this rank; None for one for each example.
        """
        options = self.preconditioning
        if options is None:
            return None
        return kaisa.KFACPreconditioner(
            model,
            optimizer,
            damping=options.damping,
            factor_update_steps=options.factor_update_steps,
            inv_update_steps=options.inv_update_steps,
            factor_decay=options.factor_decay,
            kl_clip=options.kl_clip or None,
            trust_region=None if options.fisher_norm is None else FisherNorm(options.fisher_norm),
            solver=options.solver,
            sharing=options.sharing,
            seed=seed,
            grad_worker_fraction=options.grad_worker_fraction,
            memory_budget=options.memory_budget,
            collectives=ranks,
            loss_terms=loss_terms,
            skip_layers=outside(model, options.parts),
        )


def outside(model: nn.Module, parts: str | None) -> list[str]:
    """Return patterns of the modules that lie in none of some parts of a model; None for all of it.

    Raises:
        ConfigurationError: the model has no such part.
    """
    if parts is None:
        return []
    names = [name for name, _ in unwrapped(model).named_modules() if name]
    wanted = [part.strip() for part in parts.split(",")]
    for part in wanted:
        if not any(_is_inside(name, part) for name in names):
            known = sorted({name.split(".")[-1] for name in names if name.count(".") <= 1})
            raise ConfigurationError(f"the model has no part {part!r}; choose from {', '.join(known)}")
    return [f"^{re.escape(name)}$" for name in names if not any(_is_inside(name, part) for part in wanted)]


def _is_inside(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def learning_rate_share(step: int, steps: int) -> float:
    """Return the schedule that all contestants share: a short rise, then half a cosine to zero.

    Args:
        step: how many steps lie behind.
        steps: how many there are in all.

    Returns:
        The share of the highest learning rate, above 0 and at most 1.
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1)))
