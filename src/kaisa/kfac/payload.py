"""How numbers are written for the way: as they are, in a shorter type, or in 8 bits rounded at random.

The 8-bit form keeps one grid (`kaisa.grids`) for each block of 128 numbers of a factor or gradient, from −max|x| to
max|x|, and rounds up or down with the probability that makes the result right on average: E[decode(encode(x))] = x,
within one step max|x| / 127 of the block. A sum over ranks averages the rounding out, and the running average of the
factors does so over time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.grids import Grid, symmetric
from kaisa.kfac.routes import BLOCK, INT8, SCALE_BYTES, blocks_of, int8_length

_BINS = 254  # codes from −127 to 127

Wire = torch.dtype | str | None


@dataclass(frozen=True)
class Payload:
    """The forms in which numbers travel: None for the type that they are held in, a shorter type (or its name), "int8".

    Attributes:
        statistics: of the factors' sums, which are added up in full precision on arrival.
        gradients: of preconditioned gradients; every rank then works with the rounded values, so that all stay equal.
        bucket_bytes: statistics travel in messages of about this size, the first while the backward pass runs, and
            gradients in messages of whole groups of layers, each while the next is being preconditioned.
        deferred: whether statistics wait on their rank until decompositions are due and then travel once for all steps
            since (see ``kaisa.kfac.deferral``); None for yes at COMM-OPT, where traffic is bought with memory, when no
            layer is tied and decompositions are not spread over steps.

    Raises:
        ConfigurationError: a form that does not exist.
    """

    statistics: Wire = None
    gradients: Wire = None
    bucket_bytes: int = 25 * 2**20
    deferred: bool | None = None

    def name_of(self, kind: str) -> str | None:
        """Returns the form of "statistics" or "gradients" as a name, None for the type that they are held in."""
        form: Wire = getattr(self, kind)
        return str(form).removeprefix("torch.") if isinstance(form, torch.dtype) else form

    def __post_init__(self) -> None:
        for name in ("statistics", "gradients"):
            form = getattr(self, name)
            if isinstance(form, str) and isinstance(getattr(torch, form, None), torch.dtype) and form != INT8:
                form = getattr(torch, form)
                object.__setattr__(self, name, form)
            if not (form is None or form == INT8 or (isinstance(form, torch.dtype) and form.is_floating_point)):
                raise ConfigurationError(f"Payload.{name} is {form!r}; give a floating-point type, 'int8' or None")
        if self.bucket_bytes < 1:
            raise ConfigurationError(f"Payload.bucket_bytes is {self.bucket_bytes}; give at least 1")


def encoded_length(sizes: Sequence[int], form: Wire) -> int:
    """Returns how many elements a message of parts of these sizes has; bytes in the 8-bit form."""
    return int8_length(sizes) if form == INT8 else sum(sizes)


def encode(parts: Sequence[Tensor], form: Wire, like: Tensor, seed: int) -> Tensor:
    """Returns one flat message.

    Args:
        parts: flat tensors; no block of the 8-bit form spans two of them.
        form: what to write them as.
        like: an empty tensor of the type that they are held in, on their device.
        seed: decides the rounding; equal numbers and seeds make equal messages.
    """
    if form != INT8:
        numbers = torch.cat([part.to(like.dtype) for part in parts]) if parts else like.new_empty(0)
        return numbers if form is None else numbers.to(form)
    padded = [F.pad(part.float(), (0, -part.numel() % BLOCK)).reshape(-1, BLOCK) for part in parts]
    blocks = torch.cat(padded) if padded else like.new_empty(0, BLOCK).float()
    grid = symmetric(blocks.abs().amax(1, keepdim=True), _BINS)
    codes = grid.encode(blocks, generator=torch.Generator(device=like.device).manual_seed(seed)).to(torch.int8)
    of_parts = codes.split([blocks_of(part.numel()) for part in parts])
    unpadded = [code.flatten()[: part.numel()] for code, part in zip(of_parts, parts, strict=True)]
    return torch.cat((grid.step.flatten().view(torch.int8), *unpadded))


def decode(message: Tensor, sizes: Sequence[int], form: Wire, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of a message, flat."""
    if form != INT8:
        return message.to(dtype)
    counts = [blocks_of(size) for size in sizes]
    start = SCALE_BYTES * sum(counts)
    header = message[:start].clone().view(torch.float32).to(dtype)  # a copy, because a view wants alignment
    parts = zip(message[start:].split(list(sizes)), header.split(counts), sizes, strict=True)
    numbers = [
        Grid(steps.repeat_interleave(BLOCK)[:size], None, -_BINS // 2, _BINS).decode(codes.to(dtype))
        for codes, steps, size in parts
    ]
    return torch.cat(numbers) if numbers else header
