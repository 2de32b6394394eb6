"""How numbers are written for the way: as they are, in a shorter type, or in 8 bits rounded at random.

The 8-bit form keeps one scale for each block of 256 numbers and rounds x · 127 / max|x| up or down with the probability
that makes the result right on average: E[decode(encode(x))] = x, within one step max|x| / 127 of the block. A sum over
ranks averages the rounding out, and the running average of the factors does so over time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kaisa.errors import ConfigurationError

INT8 = "int8"
_BLOCK, _LEVELS, _SCALE_BYTES = 256, 127, 4

Wire = torch.dtype | str | None


@dataclass(frozen=True)
class Payload:
    """The forms in which numbers travel: None for the type that they are held in, a shorter type, or "int8".

    Attributes:
        statistics: of the factors' sums, which are added up in full precision on arrival.
        gradients: of preconditioned gradients; every rank then works with the rounded values, so that all stay equal.
        bucket_bytes: statistics travel in messages of about this size, the first while the backward pass runs.

    Raises:
        ConfigurationError: a form that does not exist.
    """

    statistics: Wire = None
    gradients: Wire = None
    bucket_bytes: int = 25 * 2**20

    def __post_init__(self) -> None:
        for name in ("statistics", "gradients"):
            form = getattr(self, name)
            if not (form is None or form == INT8 or (isinstance(form, torch.dtype) and form.is_floating_point)):
                raise ConfigurationError(f"Payload.{name} is {form!r}; give a floating-point type, 'int8' or None")
        if self.bucket_bytes < 1:
            raise ConfigurationError(f"Payload.bucket_bytes is {self.bucket_bytes}; give at least 1")


def encoded_length(numbers: int, form: Wire) -> int:
    """Returns how many elements a message of so many numbers has; bytes in the 8-bit form."""
    if form != INT8:
        return numbers
    return -(-numbers // _BLOCK) * (_BLOCK + _SCALE_BYTES)


def encode(parts: Sequence[Tensor], form: Wire, like: Tensor, seed: int) -> Tensor:
    """Returns one flat message.

    Args:
        parts: flat tensors.
        form: what to write them as.
        like: an empty tensor of the type that they are held in, on their device.
        seed: decides the rounding; equal numbers and seeds make equal messages.
    """
    numbers = torch.cat([part.to(like.dtype) for part in parts]) if parts else like.new_empty(0)
    if form != INT8:
        return numbers if form is None else numbers.to(form)
    blocks = F.pad(numbers.float(), (0, -numbers.numel() % _BLOCK)).reshape(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / _LEVELS
    generator = torch.Generator(device=like.device).manual_seed(seed)
    noise = torch.rand(blocks.shape, generator=generator, device=like.device)
    # A block of zeros has the scale 0; the quotient's NaN becomes 0.
    rounded = torch.floor(torch.nan_to_num(blocks / scales, posinf=0.0, neginf=0.0) + noise)
    rounded = rounded.clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return torch.cat((scales.flatten().view(torch.int8), rounded.flatten()))


def decode(message: Tensor, numbers: int, form: Wire, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of a message."""
    if form != INT8:
        return message.to(dtype)
    count = -(-numbers // _BLOCK)
    header = message[: _SCALE_BYTES * count].clone().view(torch.float32)  # a copy, because a view wants alignment
    values = message[_SCALE_BYTES * count :].reshape(count, _BLOCK).to(dtype) * header.to(dtype)[:, None]
    return values.flatten()[:numbers]
