"""Hz as the difference of two gradients: for what has no second derivative, or no memory for it.

    Hz ≈ (g(x + hz) − g(x)) / h        h = 2√ε (1 + |x|) / |z|

balances what rounding does to the difference, which is of the order ε |g| / h, against the third derivative, which
enters with h. Where gradients jump, their jumps enter as well, with a size of the order 1 / √h: larger distances
soften them. Both |x| and |z| are those of all parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError


def check_precision(parameters: Sequence[Tensor]) -> None:
    """Raise ConfigurationError where a parameter is too coarse to be moved a little."""
    for parameter in parameters:
        if parameter.dtype.itemsize < 4:
            raise ConfigurationError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}, too coarse for differences of "
                "gradients; use backward(loss), or parameters of 32 bits"
            )


@contextmanager
def displaced(parameters: Sequence[Tensor], probe: Sequence[Tensor], distance: float | None) -> Iterator[Tensor]:
    """Move parameters by h along a probe, and give h; afterwards they have their values again, to the bit.

    A distance takes the place of 2√ε.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    device = parameters[0].device
    eps = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    h = (distance or 2 * eps**0.5) * (1 + _norm(kept, device)) / _norm(probe, device)
    with torch.no_grad():
        for parameter, z in zip(parameters, probe, strict=True):
            parameter.addcmul_(z, h.to(z.device, z.dtype))
    try:
        yield h
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), kept)


def quotients(before: Sequence[Tensor], after: Sequence[Tensor], h: Tensor) -> list[Tensor]:
    """Return the differences of gradients over h."""
    return [torch.sub(y, x).div_(h.to(y.device, y.real.dtype)) for x, y in zip(before, after, strict=True)]


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    norms = [norm.to(device, torch.float64) for norm in torch._foreach_norm(list(tensors))]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


class RandomState:
    """The state of torch's generators, on the processor and on the device in use, when it was made."""

    def __init__(self) -> None:
        self.processor = torch.get_rng_state()
        self.device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same random numbers once more, and go on afterwards as if nothing had been drawn."""
        devices = [torch.cuda.current_device()] if self.device is not None else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.processor)
            if self.device is not None:
                torch.cuda.set_rng_state(self.device)
            yield
