"""What a layer gives for an input, without running the layers after it.

    with reaching(model, "features.4") as activation:
        y = activation(x)     # differentiable; the forward pass ends at the layer

Ending there saves time, and lets an input have another size than the one that the last layers want.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kaisa.curvature import outputs_of
from kaisa.errors import ConfigurationError
from kaisa.explain.modules import find_module

Activation = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """Ends a forward pass at a layer."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


@contextmanager
def reaching(model: nn.Module, layer: str, arguments: Mapping[str, Any] | None = None) -> Iterator[Activation]:
    """Give the function from an input of the model to the output of a layer; ``arguments`` are further ones.

    Raises:
        ConfigurationError: the model has no such layer, or does not call it.
    """

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(outputs_of(output))

    def activation(x: Tensor) -> Tensor:
        try:
            model(x, **(arguments or {}))
        except _Reached as reached:
            return reached.output
        raise ConfigurationError(
            f"the layer {layer!r} is not called in the forward pass of this model; name one that is"
        )

    handle = find_module(model, layer).register_forward_hook(stop)
    try:
        yield activation
    finally:
        handle.remove()


def mean_activation(output: Tensor, channels: Tensor | None) -> Tensor:
    """Return the mean activation of each image (images,), of one channel each where channels are given.

    Args:
        output: (images, channels, *places), or (images, units).
        channels: (images,) the channel that counts of each image; None for all.

    Raises:
        ConfigurationError: there is no such channel.
    """
    if channels is not None:
        if output.ndim < 2 or int(channels.max()) >= output.shape[1] or int(channels.min()) < 0:
            raise ConfigurationError(
                f"channel {channels.tolist()} of a layer that gives {tuple(output.shape[1:])}; "
                f"give numbers from 0 to {output.shape[1] - 1 if output.ndim > 1 else 0}"
            )
        output = output.take_along_dim(channels.to(output.device).reshape(-1, *[1] * (output.ndim - 1)), 1)
    return output.flatten(1).mean(1) if output.ndim > 1 else output
