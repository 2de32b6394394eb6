"""The operations of the update rules, on lists of tensors: all at once, or one tensor after another.

A rule is written once, against either class; both give the same numbers. A factor is one number for the whole list or
one for each tensor. Names that end in an underscore change their first argument.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Tensors = list[Tensor]
Factor = float | list[float]


class Operations(Protocol):
    """What the rules are made of; x, y and z are tensors at the same place of each list."""

    def negative(self, xs: Tensors) -> list[Tensor]:
        """Return -x."""

    def multiply_(self, xs: Tensors, factor: Factor) -> None:
        """Set x to factor · x."""

    def multiply(self, xs: Tensors, factor: Factor) -> list[Tensor]:
        """Return factor · x."""

    def add(self, xs: Tensors, ys: Tensors, factor: float) -> list[Tensor]:
        """Return x + factor · y."""

    def add_(self, xs: Tensors, ys: Tensors, factor: float) -> None:
        """Set x to x + factor · y."""

    def shift_(self, xs: Tensors, numbers: Factor) -> None:
        """Set x to x + number."""

    def mix(self, xs: Tensors, ys: Tensors, weight: float) -> list[Tensor]:
        """Return (1 - weight) · x + weight · y."""

    def mix_(self, xs: Tensors, ys: Tensors, weight: float) -> None:
        """Set x to (1 - weight) · x + weight · y."""

    def add_product_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: float) -> None:
        """Set x to x + factor · y · z."""

    def add_quotient_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: Factor) -> None:
        """Set x to x + factor · y / z."""

    def maximum_(self, xs: Tensors, ys: Tensors) -> None:
        """Set x to the larger of x and y."""

    def root(self, xs: Tensors) -> list[Tensor]:
        """Return √x."""

    def copy_(self, xs: Tensors, ys: Tensors) -> None:
        """Set x to y."""


class Together:
    """One call for a whole list."""

    def negative(self, xs: Tensors) -> list[Tensor]:
        return list(torch._foreach_neg(xs))

    def multiply_(self, xs: Tensors, factor: Factor) -> None:
        torch._foreach_mul_(xs, factor)

    def multiply(self, xs: Tensors, factor: Factor) -> list[Tensor]:
        return list(torch._foreach_mul(xs, factor))

    def add(self, xs: Tensors, ys: Tensors, factor: float) -> list[Tensor]:
        return list(torch._foreach_add(xs, ys, alpha=factor))

    def add_(self, xs: Tensors, ys: Tensors, factor: float) -> None:
        torch._foreach_add_(xs, ys, alpha=factor)

    def shift_(self, xs: Tensors, numbers: Factor) -> None:
        torch._foreach_add_(xs, numbers)

    def mix(self, xs: Tensors, ys: Tensors, weight: float) -> list[Tensor]:
        return list(torch._foreach_lerp(xs, ys, weight))

    def mix_(self, xs: Tensors, ys: Tensors, weight: float) -> None:
        torch._foreach_lerp_(xs, ys, weight)

    def add_product_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: float) -> None:
        torch._foreach_addcmul_(xs, ys, zs, factor)

    def add_quotient_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: Factor) -> None:
        torch._foreach_addcdiv_(xs, ys, zs, factor)

    def maximum_(self, xs: Tensors, ys: Tensors) -> None:
        torch._foreach_maximum_(xs, ys)

    def root(self, xs: Tensors) -> list[Tensor]:
        return list(torch._foreach_sqrt(xs))

    def copy_(self, xs: Tensors, ys: Tensors) -> None:
        torch._foreach_copy_(xs, ys)


class OneByOne:
    """A call for each tensor: for tensors that lists are not made for, and to hold the other against."""

    def negative(self, xs: Tensors) -> list[Tensor]:
        return [-x for x in xs]

    def multiply_(self, xs: Tensors, factor: Factor) -> None:
        for x, f in zip(xs, _each(factor, xs), strict=True):
            x.mul_(f)

    def multiply(self, xs: Tensors, factor: Factor) -> list[Tensor]:
        return [x.mul(f) for x, f in zip(xs, _each(factor, xs), strict=True)]

    def add(self, xs: Tensors, ys: Tensors, factor: float) -> list[Tensor]:
        return [x.add(y, alpha=factor) for x, y in zip(xs, ys, strict=True)]

    def add_(self, xs: Tensors, ys: Tensors, factor: float) -> None:
        for x, y in zip(xs, ys, strict=True):
            x.add_(y, alpha=factor)

    def shift_(self, xs: Tensors, numbers: Factor) -> None:
        for x, number in zip(xs, _each(numbers, xs), strict=True):
            x.add_(number)

    def mix(self, xs: Tensors, ys: Tensors, weight: float) -> list[Tensor]:
        return [x.lerp(y, weight) for x, y in zip(xs, ys, strict=True)]

    def mix_(self, xs: Tensors, ys: Tensors, weight: float) -> None:
        for x, y in zip(xs, ys, strict=True):
            x.lerp_(y, weight)

    def add_product_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: float) -> None:
        for x, y, z in zip(xs, ys, zs, strict=True):
            x.addcmul_(y, z, value=factor)

    def add_quotient_(self, xs: Tensors, ys: Tensors, zs: Tensors, factor: Factor) -> None:
        for x, y, z, f in zip(xs, ys, zs, _each(factor, xs), strict=True):
            x.addcdiv_(y, z, value=f)

    def maximum_(self, xs: Tensors, ys: Tensors) -> None:
        for x, y in zip(xs, ys, strict=True):
            torch.maximum(x, y, out=x)

    def root(self, xs: Tensors) -> list[Tensor]:
        return [x.sqrt() for x in xs]

    def copy_(self, xs: Tensors, ys: Tensors) -> None:
        for x, y in zip(xs, ys, strict=True):
            x.copy_(y)


TOGETHER = Together()
ONE_BY_ONE = OneByOne()


def _each(factor: Factor, xs: Tensors) -> list[float]:
    return factor if isinstance(factor, list) else [factor] * len(xs)
