"""What keeps an image that is made by optimisation from being noise: norms, and a blur.

For x of shape (images, channels, *positions), with one, two or more dimensions of positions, one number an image:

    alpha_norm        ‖x‖_α^α = Σ |x|^α
    total_variation   Σ over positions p of [ Σ over dimensions d of (x[p + e_d] − x[p])² ]^{β/2}

where p runs over the positions that have a next one in every dimension (Mahendran & Vedaldi 2015, arXiv 1412.0035).
"""

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def alpha_norm(x: Tensor, alpha: float = 6.0) -> Tensor:
    """Returns ‖x‖_α^α of every image (images,)."""
    return x.abs().pow(alpha).flatten(1).sum(1)


def total_variation(x: Tensor, beta: float = 2.0) -> Tensor:
    """Returns the total variation of every image (images,), 0 where there are no positions or one in a dimension."""
    dimensions = range(2, x.ndim)
    if not dimensions or min(x.shape[2:]) < 2:
        return x.new_zeros(x.shape[0])
    here = _cut(x, dimensions, None)
    squares = torch.zeros_like(here)
    for dimension in dimensions:
        squares = squares + (_cut(x, dimensions, dimension) - here).square()
    # The square root has no derivative at 0, where the image is flat.
    powers = squares if beta == 2 else (squares + torch.finfo(x.dtype).eps).pow(beta / 2)
    return powers.flatten(1).sum(1)


def _cut(x: Tensor, dimensions: range, moved: int | None) -> Tensor:
    """Returns the positions that have a next one in every dimension, or those next to them in one."""
    for dimension in dimensions:
        x = x.narrow(dimension, 1 if dimension == moved else 0, x.shape[dimension] - 1)
    return x


def blur(x: Tensor, sigma: float) -> Tensor:
    """Returns the images convolved with a Gaussian of a width in pixels, their borders repeated; 0 changes nothing."""
    dimensions = x.ndim - 2
    if sigma <= 0 or dimensions not in _CONVOLUTIONS:
        return x
    reach = min(max(1, round(3 * sigma)), *(size - 1 for size in x.shape[2:]))
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = (-(taps / sigma).square() / 2).exp()
    kernel = kernel / kernel.sum()
    flat = x.reshape(-1, 1, *x.shape[2:])
    for dimension in range(dimensions):
        shape, padding = [1] * dimensions, [0] * (2 * dimensions)
        shape[dimension] = len(taps)
        padding[2 * (dimensions - 1 - dimension)] = padding[2 * (dimensions - 1 - dimension) + 1] = reach
        padded = functional.pad(flat, padding, mode="replicate")
        flat = _CONVOLUTIONS[dimensions](padded, kernel.reshape(1, 1, *shape))
    return flat.reshape(x.shape)
