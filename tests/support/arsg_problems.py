"""The problems of the golden values of ARSG and RSG, from their formulas, and a run of an optimizer on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

GOLDEN = Path(__file__).parents[1] / "optim" / "golden" / "arsg.json"
CASES: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]

Loss = Callable[[list[Tensor], int], Tensor]

QUADRATIC = torch.tensor([[4, 1, 0.5, 0], [1, 3, 0, 0.25], [0.5, 0, 2, -0.5], [0, 0.25, -0.5, 1]], dtype=torch.float64)


def quad4(parameters: list[Tensor], step: int) -> Tensor:
    """½ wᵀA w − bᵀw + 0.05 Σ w⁴."""
    (w,) = parameters
    b = torch.tensor([1, -2, 0.5, 3], dtype=w.dtype)
    return 0.5 * w @ QUADRATIC.to(w.dtype) @ w - b @ w + 0.05 * (w**4).sum()


def mlp(parameters: list[Tensor], step: int) -> Tensor:
    """Cross-entropy of a perceptron on rows 4 (t mod 3) to 4 (t mod 3) + 3, t from 0."""
    rows = torch.arange(4 * (step % 3), 4 * (step % 3) + 4)
    inputs = torch.sin(0.37 * torch.arange(48, dtype=parameters[0].dtype)).view(12, 4)[rows]
    first, first_bias, second, second_bias = parameters
    hidden = torch.tanh(functional.linear(inputs, first, first_bias))
    return functional.cross_entropy(functional.linear(hidden, second, second_bias), rows % 3)


LOSSES: dict[str, Loss] = {"quad4": quad4, "mlp_minibatch": mlp}


def initial(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype).requires_grad_() for value in case["init"]]


def perceptron(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return initial(CASES["arsg_mlp_default"], dtype)


def train(
    parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range, loss: Loss = mlp, parts: int = 1
) -> list[float]:
    """Take steps, each with the mean gradient over as many parts; return the losses before them."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            value = loss(parameters, step * parts + part)
            (value / parts).backward()
            losses.append(float(value.detach()))
        optimizer.step()
    return losses


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all tensors are bitwise the same."""
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def farthest(ones: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference."""
    return max(float((one - other).detach().abs().max()) for one, other in zip(ones, others, strict=True))
