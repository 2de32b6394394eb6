"""Holds piecewise functions to the pieces that they took: the side of a rectifier, the element of a pool.

    first pass   y = relu(x)                     and where x > 0 is remembered
    held         y = x where x was > 0, else 0   wherever x has moved since

At the first point both have the same value and gradient. Away from it the gradient of the second does not jump, so
that differences of gradients come to what autograd takes for the second derivative, which knows nothing of jumps.

    held to the piece                                                     as
    relu                                                                  the sign of its result
    leaky_relu, relu6, hardtanh, hardsigmoid, threshold, clamp, abs       slope · x + offset
    softshrink, hardshrink, hardswish                                     the same, hardswish x times it
    maximum, minimum                                                      weight · x + (1 − weight) · y
    max_pool, adaptive_max_pool                                           elements x[indices]

Operations are told apart by their order, so that all passes must make the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kaisa.errors import StateError

Function = Callable[..., Any]
Observed = tuple[Any, Function]  # what a function returned, and the same function held to its piece


class Branches(TorchFunctionMode):
    """Remembers pieces while `observed` is open, and holds functions to them while `held` is."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[tuple[Function, torch.Size, Function]] = []
        self._next: int | None = None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Remember the pieces that functions take in here."""
        self._next = None
        with self:
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold functions in here to the pieces that those before them took.

        Raises:
            StateError: they are not the same functions.
        """
        if not self._pieces:  # nothing to hold, and no need to look at every call
            yield
            return
        self._next = 0
        with self:
            yield
        if self._next != len(self._pieces):
            raise _other_operations()

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kink = KINKS.get(func)
        if kink is None or not torch.is_grad_enabled() or not _requires_grad(args):
            return func(*args, **kwargs)
        if self._next is None:
            result, again = kink(func, *args, **kwargs)
            self._pieces.append((func, args[0].shape, again))
            return result
        if self._next == len(self._pieces) or self._pieces[self._next][:2] != (func, args[0].shape):
            raise _other_operations()
        again = self._pieces[self._next][2]
        self._next += 1
        return again(*args, **kwargs)


def _requires_grad(args: Any) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _other_operations() -> StateError:
    return StateError(
        "the closure did not make the same operations again, so that differences of its gradients mean nothing; let "
        "whatever is random in it draw from torch's own generators, or use backward(loss)"
    )


def _rectifier(func: Function, *args: Any, **kwargs: Any) -> Observed:
    result = func(*args, **kwargs)
    kept = result.detach()

    def again(x: Tensor, inplace: bool = False) -> Tensor:
        if inplace or func in IN_PLACE:
            return x.mul_(kept > 0)
        held: Tensor = torch.ops.aten.threshold_backward(x, kept, 0)
        return held

    return result, again


def _line(func: Function, x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Observed:
    """Observe a function of each element that is straight between its kinks."""
    slope, offset = _slope(func, x, *args, **kwargs)

    def again(x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        if inplace or func in IN_PLACE:
            return x.mul_(slope).add_(offset)
        return torch.addcmul(offset, slope, x)

    if inplace:
        kwargs["inplace"] = True
    return func(x, *args, **kwargs), again


def _slope(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    alone = x.detach().clone().requires_grad_()
    result = func(alone.clone(), *args, **kwargs)
    (slope,) = torch.autograd.grad(result.sum(), alone)
    return slope, result.detach() - slope * x.detach()


def _hard_swish(func: Function, x: Tensor, inplace: bool = False) -> Observed:
    slope, offset = _slope(functional.hardsigmoid, x)

    def again(x: Tensor, inplace: bool = False) -> Tensor:
        before = x.clone() if inplace else x
        held = before * torch.addcmul(offset, slope, before)
        return x.copy_(held) if inplace else held

    return again(x, inplace), again  # not func itself, whose gradient is rounded otherwise


def _extreme(func: Function, x: Tensor, other: Tensor) -> Observed:
    result = func(x, other)
    with torch.no_grad():  # where both are the same, half of each, as autograd has it
        weight = (result == x).to(result.dtype).add_(result != other).div_(2)
    return result, partial(_mixed, weight)


def _mixed(weight: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return weight * x + (1 - weight) * other


def _pool(func: Function, *args: Any, **kwargs: Any) -> Observed:
    pool, dimensions = POOLS[func]
    is_asked = kwargs.pop("return_indices", False)
    result, indices = pool(*args, **kwargs, return_indices=True)

    def again(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = x.flatten(-dimensions).gather(-1, indices.flatten(-dimensions)).view_as(indices)
        return (held, indices) if is_asked else held

    return ((result, indices) if is_asked else result), again


LINES_IN_PLACE: tuple[Function, ...] = (
    *(torch.clamp_, torch.clip_, torch.clamp_min_, torch.clamp_max_, torch.abs_),
    *(Tensor.clamp_, Tensor.clip_, Tensor.clamp_min_, Tensor.clamp_max_, Tensor.abs_),
)
IN_PLACE: frozenset[Function] = frozenset((torch.relu_, Tensor.relu_, *LINES_IN_PLACE))
POOLS: dict[Function, tuple[Function, int]] = {
    variant: (pool, dimensions)
    for dimensions, pool, *others in (
        (1, functional.max_pool1d, functional.max_pool1d_with_indices, torch.max_pool1d),
        (2, functional.max_pool2d, functional.max_pool2d_with_indices, torch.max_pool2d),
        (3, functional.max_pool3d, functional.max_pool3d_with_indices, torch.max_pool3d),
        (1, functional.adaptive_max_pool1d, functional.adaptive_max_pool1d_with_indices),
        (2, functional.adaptive_max_pool2d, functional.adaptive_max_pool2d_with_indices),
        (3, functional.adaptive_max_pool3d, functional.adaptive_max_pool3d_with_indices),
    )
    for variant in (pool, *others)
}
RECTIFIERS: tuple[Function, ...] = (functional.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_)
LINES: tuple[Function, ...] = (
    *(functional.leaky_relu, functional.relu6, functional.hardtanh, functional.hardsigmoid, functional.threshold),
    *(functional.softshrink, functional.hardshrink, torch.hardshrink, Tensor.hardshrink, torch.threshold),
    *(torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max, torch.abs, torch.absolute),
    *(Tensor.clamp, Tensor.clip, Tensor.clamp_min, Tensor.clamp_max, Tensor.abs, Tensor.absolute, Tensor.__abs__),
    *LINES_IN_PLACE,
)
EXTREMES: tuple[Function, ...] = (torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum)
KINKS: dict[Function, Callable[..., Observed]] = {
    **dict.fromkeys(RECTIFIERS, _rectifier),
    **dict.fromkeys(LINES, _line),
    **dict.fromkeys(EXTREMES, _extreme),
    **dict.fromkeys(POOLS, _pool),
    functional.hardswish: _hard_swish,
}
