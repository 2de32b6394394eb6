"""K-FAC as a Lightning callback.

    training_step, backward ─► unscale ─► [on_before_optimizer_step: K-FAC] ─► clip ─► optimizer.step

The preconditioner is made when the model is wrapped and the optimizer there (``on_fit_start``). Its state is in the
Trainer's own checkpoint, that of every rank.
"""

from typing import Any

import torch

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.integrations.micro_batches import MicroBatches
from kaisa.kfac.gathering import State, gathered, own_part

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise ConfigurationError(f"{error.name} is not installed; pip install 'kaisa[lightning]'") from error


class KFACCallback(Callback):  # type: ignore[misc]  # Lightning is not needed to check types
    """Preconditions the gradients of every step of ``Trainer.fit`` with K-FAC.

    Args:
        module: the dotted name of the submodule to precondition, "" for all of the LightningModule. Name the network
            where ``training_step`` calls that and not the LightningModule itself.
        options: those of ``kaisa.KFACPreconditioner``; accumulation and loss scale are the Trainer's.

    Attributes:
        kfac: the preconditioner, from ``on_fit_start`` on; None before.

    Raises:
        ConfigurationError: when the fit begins: the model has several optimizers, or the strategy shards parameters.
        StateError: the checkpoint is of another number of ranks, model or solver.
    """

    def __init__(self, module: str = "", **options: Any) -> None:
        self.kfac: kaisa.KFACPreconditioner | None = None
        self._module = module
        self._options = options
        self._states: list[State] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(trainer)
        planned = trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        of_trainer = {
            "accumulation_steps": planned,
            "grad_scaler": MicroBatches(scaler, planned, lambda: int(trainer.accumulate_grad_batches)),
        }
        model = pl_module.get_submodule(self._module)
        self.kfac = kaisa.KFACPreconditioner(model, trainer.optimizers[0], **{**of_trainer, **self._options})
        self._restore()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self.kfac is not None
        self.kfac.step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> State:
        """Returns the states of all ranks on the first, for the checkpoint; all ranks call it."""
        if self.kfac is None:
            return {}
        return {"ranks": gathered(self.kfac.state_dict(), self.kfac.collectives, self.kfac.device)}

    def load_state_dict(self, state_dict: State) -> None:
        """Goes on from a checkpoint, as soon as the preconditioner is there."""
        self._states = state_dict["ranks"]
        self._restore()

    def _restore(self) -> None:
        if self.kfac is None or not self._states:
            return
        self.kfac.load_state_dict(own_part(self._states, self.kfac.collectives))
        self._states = []

    def _close(self) -> None:
        if self.kfac is not None:
            self.kfac.close()


def _check(trainer: Trainer) -> None:
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers, but KFACCallback goes with one; "
            "call kaisa.KFACPreconditioner yourself in manual optimization"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ConfigurationError(
            f"the strategy is {type(trainer.strategy).__name__}; K-FAC needs whole parameters on every rank: "
            "one device, or strategy='ddp'"
        )
