"""kfac-pytorch's constructor, so that a script written for it runs after one changed import line.

    from kaisa.integrations.kfac_pytorch import KFACPreconditioner      # was: from kfac.preconditioner import ...

Arguments and their defaults are those of kfac-pytorch 0.4. What decides how bytes travel but not what is computed
(buckets, packing, hooks, log level) is accepted and does nothing. The factors have the scale of the Fisher; the
reference's own scale, under which its published settings were found, is ``factor_scaling="kaisa"``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.loss_scale import LossScaler
from kaisa.schedules import Scalar

_SOLVERS = {"eigen": "eigen", "inverse": "cholesky"}


class KFACPreconditioner(kaisa.KFACPreconditioner):
    """``kaisa.KFACPreconditioner`` behind the signature of ``kfac.preconditioner.KFACPreconditioner``.

    Args:
        model: the model.
        factor_update_steps, inv_update_steps, damping, factor_decay, kl_clip, lr: as there, defaults included.
        accumulation_steps, grad_scaler, factor_dtype, inv_dtype, skip_layers: as there.
        compute_method: "eigen" or "inverse", or the enumeration's member; "inverse" is ``solver="cholesky"``.
        allreduce_bucket_cap_mb, assignment_strategy, colocate_factors, compute_eigenvalue_outer_product,
            symmetry_aware, update_factors_in_hook, loglevel: accepted; they change nothing that is computed.
        options: any other option of ``kaisa.KFACPreconditioner``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_update_steps: Scalar = 1,
        inv_update_steps: Scalar = 1,
        damping: Scalar = 0.001,
        factor_decay: Scalar = 0.95,
        kl_clip: Scalar | None = 0.001,
        lr: Scalar = 0.1,
        accumulation_steps: int = 1,
        allreduce_bucket_cap_mb: float = 25.0,
        assignment_strategy: Any = "compute",
        colocate_factors: bool = True,
        compute_method: Any = "eigen",
        compute_eigenvalue_outer_product: bool = True,
        symmetry_aware: bool = False,
        grad_scaler: LossScaler | Callable[[], float] | None = None,
        factor_dtype: torch.dtype | None = None,
        inv_dtype: torch.dtype = torch.float32,
        skip_layers: str | Sequence[str] | None = None,
        update_factors_in_hook: bool = True,
        loglevel: int = 10,
        **options: Any,
    ) -> None:
        method = str(getattr(compute_method, "name", compute_method)).lower()
        if method not in _SOLVERS:
            raise ConfigurationError(f"compute_method is {compute_method!r}; give 'eigen' or 'inverse'")
        super().__init__(
            model,
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            damping=damping,
            factor_decay=factor_decay,
            kl_clip=kl_clip,
            lr=lr,
            accumulation_steps=accumulation_steps,
            grad_scaler=grad_scaler,
            factor_dtype=factor_dtype,
            inv_dtype=inv_dtype,
            skip_layers=skip_layers,
            **{"solver": _SOLVERS[method], **options},
        )
