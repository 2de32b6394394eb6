"""Attention with its four projections spelt out as Linear modules, to compare the packed one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UnpackedAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, batch first and with no dropout."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        size, bias = packed.embed_dim, packed.in_proj_bias is not None
        self.heads = packed.num_heads
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(packed.kdim, size, bias=bias)
        self.v_proj = nn.Linear(packed.vdim, size, bias=bias)
        self.out_proj = nn.Linear(size, size, bias=bias)
        self.to(packed.out_proj.weight.dtype)
        for name, parameter in unpacked_parameters(packed).items():
            self.get_parameter(name).data.copy_(parameter)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def unpacked_parameters(packed: nn.MultiheadAttention, *, grads: bool = False) -> dict[str, Tensor]:
    """Return the packed parameters, or their gradients, under the names of `UnpackedAttention`."""

    def value(parameter: Tensor) -> Tensor:
        return parameter.grad if grads else parameter.detach()

    parts = ("q_proj", "k_proj", "v_proj")
    if packed.in_proj_weight is not None:
        weights = value(packed.in_proj_weight).chunk(3)
    else:
        weights = tuple(value(getattr(packed, f"{part}_weight")) for part in parts)
    named = {f"{part}.weight": weight for part, weight in zip(parts, weights, strict=True)}
    named["out_proj.weight"] = value(packed.out_proj.weight)
    if packed.in_proj_bias is not None:
        biases = value(packed.in_proj_bias).chunk(3)
        named |= {f"{part}.bias": bias for part, bias in zip(parts, biases, strict=True)}
        named["out_proj.bias"] = value(packed.out_proj.bias)
    return {name: tensor.clone() for name, tensor in named.items()}


def as_called(packed: nn.MultiheadAttention, *inputs: Tensor, **options: bool) -> Tensor:
    """Return the packed module's output, batch first whatever its own order is."""
    if packed.batch_first:
        return packed(*inputs, **options)[0]
    output, _ = packed(*(x.transpose(0, 1) for x in inputs), **options)
    return output.transpose(0, 1)


def attention_inputs(packed: nn.MultiheadAttention, kind: str, batch: int) -> tuple[Tensor, ...]:
    """Return (query, key, value) batch first, in float64: one tensor three times for "self"."""

    def random(length: int, size: int) -> Tensor:
        return torch.randn(batch, length, size, dtype=torch.float64)

    query = random(5, packed.embed_dim)
    if kind == "self":
        return query, query, query
    return query, random(6, packed.kdim), random(6, packed.vdim)
