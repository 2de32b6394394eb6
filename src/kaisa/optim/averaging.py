"""Spatial averaging: one number for the curvature of weights that play the same part.

    dimensions   parameter                      "auto": one number for each
    0, 1         bias, scale                    element
    2            linear, embedding              row, that is an output or a token: the mean over inputs
    3, 4, 5      convolution in 1, 2, 3-D       pair of output and input channel: the mean over the kernel

An average has the shape of the parameter with length 1 where it was taken, and is broadcast where it is used, so that
what is remembered of it is as small. Runs of n elements, which have no such shape, are kept in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Size, Tensor

from kaisa.errors import ConfigurationError

Rule = str | int | None | Callable[[Tensor], Tensor]
Averaging = Rule | Mapping[int, Rule]

AUTO = "auto"
WINDOWS: dict[int, tuple[int, ...]] = {0: (), 1: (), 2: (1,), 3: (2,), 4: (2, 3), 5: (2, 3, 4)}


def rule_for(averaging: Averaging, dimensions: int) -> Rule:
    """Return how parameters of some number of dimensions are averaged.

    A mapping from numbers of dimensions leaves those it does not name to "auto"; a number n alone means runs of n
    elements wherever there are two dimensions or more.
    """
    if isinstance(averaging, Mapping):
        return averaging.get(dimensions, AUTO)
    if isinstance(averaging, int) and dimensions < 2:
        return None
    return averaging


def check_averaging(averaging: Averaging, shape: Size) -> None:
    """Raise ConfigurationError unless parameters of a shape can be averaged so."""
    if isinstance(averaging, Mapping) and not all(type(key) is int and key >= 0 for key in averaging):
        raise ConfigurationError(f"averaging has the keys {list(averaging)!r}; give numbers of dimensions, such as 2")
    rule, dimensions = rule_for(averaging, len(shape)), len(shape)
    if rule is None or callable(rule):
        return
    if rule == AUTO:
        if dimensions not in WINDOWS:
            raise ConfigurationError(
                f"averaging='auto' knows parameters of up to 5 dimensions, but one has the shape {tuple(shape)}; give "
                f"averaging={{{dimensions}: ...}} with None, a length of runs or a function"
            )
        return
    if type(rule) is not int or rule < 1:
        raise ConfigurationError(
            f"averaging is {rule!r} for parameters of {dimensions} dimensions; give 'auto', None, the length of runs "
            "or a function"
        )
    if prod(shape) % rule:
        raise ConfigurationError(
            f"averaging over runs of {rule} does not divide the {prod(shape)} elements of a parameter of shape "
            f"{tuple(shape)}; give a divisor, or None for these parameters"
        )


def average(curvature: Tensor, averaging: Averaging, shape: Size) -> Tensor:
    """Return the averaged curvature, in a shape that is broadcast to that of ``curvature``.

    Args:
        curvature: one number an element; of a complex parameter two, in a last dimension of its own.
        averaging: a rule, or one for each number of dimensions.
        shape: of the parameter.

    Raises:
        ConfigurationError: a function returned a shape that cannot be broadcast.
    """
    rule = rule_for(averaging, len(shape))
    if rule is None:
        return curvature
    if callable(rule):
        return _checked(rule(curvature), curvature)
    if rule == AUTO:
        window = WINDOWS[len(shape)]
        return curvature.mean(window, keepdim=True) if window else curvature
    assert isinstance(rule, int)
    runs = curvature.reshape(-1, rule, *curvature.shape[len(shape) :])
    return runs.mean(1, keepdim=True).expand_as(runs).reshape(curvature.shape)


def _checked(result: Tensor, curvature: Tensor) -> Tensor:
    try:
        fits = torch.broadcast_shapes(result.shape, curvature.shape) == curvature.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ConfigurationError(
            f"the averaging function returned the shape {tuple(result.shape)} for curvature of shape "
            f"{tuple(curvature.shape)}; return one that is broadcast to it, as mean(..., keepdim=True) does"
        )
    return result
