"""Any module that is linear in its weight, written as output = input @ weight.T + bias.

By brute force: the rows of the canonical input are read off the module itself. With a weight that
is zero but for a one at (row, column), the output channel `row` *is* that column of the input.
Nothing is known here of strides, paddings, dilations or unfolding, so that an error in such
knowledge cannot be made twice.

Layout: weight matrix (groups, out / groups, columns), columns as in `weight.reshape(out, -1)` and,
for transposed convolutions, whose weight is (in, out / groups, *taps), with the channels exchanged
first. The bias column is the last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def groups_of(module: nn.Module) -> int:
    """Return into how many independent blocks of channels a module splits its weight."""
    return getattr(module, "groups", 1)


def weight_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or its gradient, as (groups, out / groups, columns)."""
    groups = groups_of(module)
    if isinstance(module, TRANSPOSED):
        inputs, outputs, *taps = weight.shape
        split = weight.reshape(groups, inputs // groups, outputs, *taps)
        return split.transpose(1, 2).reshape(groups, outputs, -1)
    if type(module).__name__ == "Conv1D":
        return weight.t().unsqueeze(0)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    """Return the inverse of `weight_matrix`."""
    groups, outputs, _ = matrix.shape
    if isinstance(module, TRANSPOSED):
        inputs, _, *taps = module.weight.shape
        split = matrix.reshape(groups, outputs, inputs // groups, *taps)
        return split.transpose(1, 2).reshape(module.weight.shape)
    if type(module).__name__ == "Conv1D":
        return matrix[0].t().contiguous()
    return matrix.reshape(module.weight.shape)


def positions_last(module: nn.Module, output: Tensor) -> Tensor:
    """Return an output, or its gradient, as (batch, positions, channels)."""
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return output.flatten(2).transpose(1, 2)
    return output.reshape(output.shape[0], -1, output.shape[-1])


def canonical_input(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the input as (batch, positions, groups, columns + 1 where there is a bias)."""
    matrix = torch.zeros_like(weight_matrix(module, module.weight.detach()))
    groups, outputs, columns = matrix.shape
    blocks = []
    for group in range(groups):
        for column in range(columns):
            blocks.append(_response(module, inputs, matrix, group, column)[..., group * outputs])
    rows = torch.stack(blocks, dim=-1).unflatten(-1, (groups, columns))
    if module.bias is None:
        return rows
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def _response(module: nn.Module, inputs: Tensor, zeros: Tensor, group: int, column: int) -> Tensor:
    probe = zeros.clone()
    probe[group, 0, column] = 1.0
    parameters = {"weight": weight_from_matrix(module, probe)}
    if module.bias is not None:
        parameters["bias"] = torch.zeros_like(module.bias)
    with torch.no_grad():
        return positions_last(module, functional_call(module, parameters, (inputs,)))


def canonical_gradient(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient at the output as (batch, positions, groups, out / groups)."""
    rows = positions_last(module, gradient)
    return rows.unflatten(-1, (groups_of(module), -1))


def gradient_matrix(module: nn.Module) -> Tensor:
    """Return what `.grad` holds as (groups, out / groups, columns + 1 where there is a bias)."""
    matrix = weight_matrix(module, module.weight.grad)
    if module.bias is None:
        return matrix
    return torch.cat([matrix, module.bias.grad.reshape(*matrix.shape[:2], 1)], dim=-1)
