"""K-FAC for loops under Accelerate, with its state in the folders of ``accelerator.save_state``.

    accelerator.backward(loss) ─► unscale_gradients ─► kfac.step() ─► clip ─► optimizer.step
                                  └────── if accelerator.sync_gradients ──────┘

The loop is the user's, so that these calls are too.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac import checkpoint

try:
    from accelerate import Accelerator, DistributedType
except ModuleNotFoundError as error:
    raise ConfigurationError(f"{error.name} is not installed; pip install 'kaisa[accelerate]'") from error

_FOLDER = "kaisa"


def preconditioner(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> kaisa.KFACPreconditioner:
    """Returns a preconditioner that knows the accelerator's accumulation and loss scale, and is saved with its state.

    Args:
        accelerator: as it was made; ``save_state`` and ``load_state`` write and read K-FAC from now on, on all ranks.
        model: as ``prepare`` returned it.
        optimizer: as ``prepare`` returned it.
        options: those of ``kaisa.KFACPreconditioner``.

    Raises:
        ConfigurationError: the accelerator shards parameters, or an option has a value that cannot work.
    """
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigurationError(
            f"the accelerator runs {accelerator.distributed_type}; K-FAC needs whole parameters on every rank: "
            "one process, or plain data parallelism"
        )
    of_accelerator = {
        "accumulation_steps": accelerator.gradient_accumulation_steps,
        "grad_scaler": accelerator.scaler,
    }
    plain = getattr(optimizer, "optimizer", optimizer)
    kfac = kaisa.KFACPreconditioner(model, plain, **{**of_accelerator, **options})

    def save(models: Any, weights: Any, output_dir: str) -> None:
        written = checkpoint.save(Path(output_dir) / _FOLDER, kfac, keep=1)
        if accelerator.is_main_process:
            _keep_only(written)

    def load(models: Any, input_dir: str) -> None:
        checkpoint.load(Path(input_dir) / _FOLDER, kfac)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return kfac


def _keep_only(written: Path) -> None:
    """Removes what another run has left in the folder: a later step of it would be taken for the newest."""
    for path in written.parent.glob("step_*"):
        if path != written:
            shutil.rmtree(path)
