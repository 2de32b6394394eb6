"""Who takes part: how each is made, and how it takes a step.

    sgd, adamw                 torch's
    muon                       torch's, of matrices (a convolution's as out × in·k·k); AdamW of the rest
    soap, shampoo              pytorch-optimizer's, where it is installed
    adahessian, arsg           of `kaisa.optim`
    kfac-pytorch on …          where it is installed
    eigen on sgd, …            ours: a solver around an optimizer

All run at one learning rate for all parameters, which the schedule sets, without weight decay.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.solvers import EKFAC, Cholesky, Eigen, Solver, WarmStart
from kaisa.kfac.trust_region import FisherNorm
from kaisa.optim import ARSG, AdaHessian

Optimizer = torch.optim.Optimizer
MOMENTUM = 0.9
SHARE = 10  # growing intervals are a tenth of the steps that lie behind

SOLVERS: dict[str, Callable[[], Solver]] = {
    "eigen": Eigen,
    "cholesky": Cholesky,
    "ekfac": EKFAC,
    "sqrt_ekfac": lambda: EKFAC(root=True),
    "warm_eigen": lambda: Eigen(WarmStart()),
    "warm_ekfac": lambda: EKFAC(WarmStart()),
    "warm_sqrt_ekfac": lambda: EKFAC(WarmStart(), root=True),
}


class Muon:
    """Muon of all matrices but embeddings and the last layer; AdamW of these and the rest.

    ``match_rms_adamw`` gives Muon's steps the length of AdamW's, so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs = [(weight, nn.Parameter(weight.detach().flatten(1))) for weight in _hidden_matrices(model)]
        chosen = {id(weight) for weight, _ in self.pairs}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        flat = [view for _, view in self.pairs]
        muon = torch.optim.Muon(flat, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts: list[Optimizer] = [muon, torch.optim.AdamW(rest, weight_decay=0.0)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Update all parameters; the views share their memory."""
        for weight, view in self.pairs:
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts:
            part.step()


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [p for p in matrices[:-1] if id(p) not in embedded]


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=MOMENTUM)


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)


def _soap(model: nn.Module) -> Any:
    peers = importlib.import_module("pytorch_optimizer")
    return peers.SOAP(model.parameters(), weight_decay=0.0, precondition_frequency=10)


def _shampoo(model: nn.Module) -> Any:
    peers = importlib.import_module("pytorch_optimizer")
    grafting = importlib.import_module("pytorch_optimizer.optimizer.utils.graft").LayerWiseGrafting
    return peers.ScalableShampoo(
        model.parameters(),
        betas=(0.9, 0.99),
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        moving_average_for_momentum=True,
        graft_type=grafting.RMSPROP,  # steps of Adam's length, as the authors train
    )


def _adahessian(model: nn.Module) -> Optimizer:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)  # its own: heats run in turns
    return AdaHessian(model.parameters(), update_period=2, generator=generator)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": Muon,
    "soap": _soap,
    "shampoo": _shampoo,
    "adahessian": _adahessian,
    "arsg": lambda model: ARSG(model.parameters()),
}
NEEDS = {"soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer"}


@dataclass(frozen=True)
class Entrant:
    """A contestant of the race.

    Attributes:
        name: what tables, plots and files call it.
        optimizer: a name of `OPTIMIZERS`.
        kfac: "ours", "kfac-pytorch", or None for the optimizer alone.
        solver: of ours, a name of `SOLVERS`.
        needs: a module without which it does not take part.
    """

    name: str
    optimizer: str
    kfac: str | None = None
    solver: str | None = None
    needs: str | None = None

    @property
    def is_present(self) -> bool:
        """Whether all that it needs is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def _field() -> dict[str, Entrant]:
    alone = [Entrant(name, name, needs=NEEDS.get(name)) for name in OPTIMIZERS]
    bases = ("sgd", "adamw")
    peer = [Entrant(f"kfac-pytorch on {base}", base, "kfac-pytorch", needs="kfac") for base in bases]
    solvers = ("eigen", "ekfac", "sqrt_ekfac", "warm_eigen")
    pairs = [(solver, base) for base in bases for solver in solvers]
    ours = [Entrant(f"{solver} on {base}", base, "ours", solver) for solver, base in [*pairs, ("cholesky", "sgd")]]
    return {entrant.name: entrant for entrant in (*alone, *peer, *ours)}


ENTRANTS = _field()


def find_entrant(name: str) -> Entrant:
    """Return the entrant of a name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in ENTRANTS:
        raise ConfigurationError(f"unknown contestant {name!r}; choose from {', '.join(ENTRANTS)}")
    return ENTRANTS[name]


@dataclass
class Driver:
    """An entrant at work on a model.

    Attributes:
        optimizer: updates the parameters.
        preconditioner: rewrites gradients before; None for an optimizer alone.
        rate: the learning rate in use.
    """

    model: nn.Module
    optimizer: Any
    preconditioner: Any = None
    rate: float = field(default=0.0)

    @classmethod
    def start(
        cls, entrant: Entrant, model: nn.Module, options: Mapping[str, Any], loss_terms: int | None, seed: int
    ) -> Driver:
        """Make optimizer and preconditioner; ``options`` are those of K-FAC on this course."""
        driver = cls(model, OPTIMIZERS[entrant.optimizer](model))
        if entrant.kfac == "ours":
            driver.preconditioner = _ours(entrant, driver, options, loss_terms, seed)
        elif entrant.kfac is not None:
            driver.preconditioner = _kfac_pytorch(driver, options)
        return driver

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all parameters."""
        self.rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forward(self) -> AbstractContextManager[Any]:
        """Return what the forward pass runs in: AdaHessian differentiates twice, which fused attention cannot."""
        return sdpa_kernel(SDPBackend.MATH) if isinstance(self.optimizer, AdaHessian) else nullcontext()

    def step(self, loss: Tensor) -> None:
        """Differentiate, precondition and update."""
        self.model.zero_grad()
        if isinstance(self.optimizer, AdaHessian):
            self.optimizer.backward(loss)
        else:
            loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase of our K-FAC; nothing of others."""
        if not isinstance(self.preconditioner, kaisa.KFACPreconditioner):
            return {}
        return dict(self.preconditioner.timings())

    def close(self) -> None:
        """Take our hooks off the model."""
        if isinstance(self.preconditioner, kaisa.KFACPreconditioner):
            self.preconditioner.close()


def growing(first: int, last: int) -> Callable[[int], int]:
    """Return an interval that is a tenth of the steps that lie behind, at least ``first`` and at most ``last``.

    The first factors come from few batches, so that the first bases are poor; what changes by as much in each
    refresh is refreshed often at first.
    """
    return lambda step: min(last, max(first, step // SHARE))


def falling(first: float, last: float, steps: int) -> Callable[[int], float]:
    """Return a damping that falls from ``first`` to ``last`` within so many steps, by the same share in each.

    Factors of few batches are poor, and need more of it.
    """
    return lambda step: first * (last / first) ** min(1.0, step / steps)


def _of_steps(options: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """Return options with the functions of the step that some of their numbers stand for."""
    kinds: dict[str, Callable[..., Any]] = {
        "factor_update_steps": growing,
        "inv_update_steps": growing,
        "damping": falling,
    }
    return {
        name: kinds[name](*value) if isinstance(value, list | tuple) and name in kinds else value
        for name, value in options.items()
        if name not in left_out
    }


def _ours(
    entrant: Entrant, driver: Driver, options: Mapping[str, Any], loss_terms: int | None, seed: int
) -> kaisa.KFACPreconditioner:
    solver = SOLVERS[str(options.get("solver", entrant.solver))]()
    given = _of_steps(options, "solver", "fisher_norm")
    has_steps_of_adam = entrant.optimizer == "adamw" or (isinstance(solver, EKFAC) and solver.root)
    region = None if has_steps_of_adam else FisherNorm(options["fisher_norm"])
    return kaisa.KFACPreconditioner(
        driver.model,
        driver.optimizer,
        solver=solver,
        loss_terms=loss_terms,
        seed=seed,
        kl_clip=None,
        trust_region=region,
        **given,
    )


def _kfac_pytorch(driver: Driver, options: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # apex is not there
        preconditioner = importlib.import_module("kfac.preconditioner").KFACPreconditioner
    given = _of_steps(options, "fisher_norm")
    # Its KL clip with this limit is the rule of ours: the rate in it cancels.
    given["kl_clip"] = lambda step: (options["fisher_norm"] * driver.rate) ** 2
    return preconditioner(driver.model, lr=lambda step: driver.rate, **given)
