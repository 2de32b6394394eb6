"""``nn.MultiheadAttention`` in few bits: its four projections. Attention itself stays as it is, as it has no weights.

PyTorch's own forward hands the packed weights to kernels that know nothing of quantisation, so that the arithmetic
between the projections is written out here, batch first, because a row of a gradient is an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.quantize.layers import QuantizedLayer

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes (positions, batch, in), a weight (out, in) and a bias; returns (positions, batch, out)."""

Watch = Callable[[Product, Tensor, Tensor, Tensor | None], Tensor]
"""Calls a product with the other arguments and returns what it returns, having looked at it."""

QUERY, KEY, VALUE, ATTENDED = range(4)
"""The inputs of the projections, as rows of the running ranges."""


def _unwatched(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


class WatchedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose projections can be looked at; neither ``add_bias_kv`` nor ``add_zero_attn``."""

    def forward_with(
        self,
        watch: Watch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``forward`` does, with every projection shown to ``watch``."""
        is_batched = query.ndim == 3
        parts = _positions_first(query, key, value, is_batched, self.batch_first)
        q, k, v = (self._by_head(part) for part in self._projected(watch, *parts))
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about attn_mask; give that too")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else _merged(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            attended, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = watch(
            partial(self._product, ATTENDED),
            attended.permute(2, 0, 1, 3).flatten(2),
            self.out_proj.weight,
            self.out_proj.bias,
        )
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return (output.transpose(0, 1) if self.batch_first else output), weights

    def _product(self, use: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _projected(self, watch: Watch, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (positions, batch, embed_dim) each."""
        size, bias = self.embed_dim, self.in_proj_bias

        def project(use: int, x: Tensor, weight: Tensor, rows: slice) -> Tensor:
            own = None if bias is None else bias if rows == slice(0, 3 * size) else bias[rows]
            return watch(partial(self._product, use), x, weight, own)

        packed = self._parameters["in_proj_weight"]
        first, second, third = (slice(index * size, (index + 1) * size) for index in range(3))
        weights: tuple[Tensor, Tensor, Tensor]
        if packed is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            together = project(QUERY, query, packed, slice(0, 3 * size))
            return together[..., first], together[..., second], together[..., third]
        elif key is value:
            last = slice(size, 3 * size)
            queries = project(QUERY, query, packed[first], first)
            return queries, *project(KEY, key, packed[last], last).chunk(2, -1)
        else:
            weights = (packed[first], packed[second], packed[third])
        return (
            project(QUERY, query, weights[0], first),
            project(KEY, key, weights[1], second),
            project(VALUE, value, weights[2], third),
        )

    def _by_head(self, x: Tensor) -> Tensor:
        """Return (batch, heads, positions, features) of (positions, batch, embed_dim)."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads.permute(1, 2, 0, 3)


class QuantizedMultiheadAttention(QuantizedLayer, WatchedMultiheadAttention):
    """``nn.MultiheadAttention`` in few bits; neither ``add_bias_kv`` nor ``add_zero_attn``."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the float module does: the output, and the weights of attention where they are wanted."""
        if self.quantization.is_exact:
            return super().forward(query, key, value, *args, **kwargs)
        return self.forward_with(_unwatched, query, key, value, *args, **kwargs)

    def _product(self, use: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.quantization.is_exact:
            return super()._product(use, x, weight, bias)
        batch_first: Tensor = self.linear(x.transpose(0, 1), weight, bias, use)
        return batch_first.transpose(0, 1)


def projection_name(product: Product, weight: Tensor) -> str:
    """Return what a product that a watch is shown projects: "in_proj" is queries, keys and values at once."""
    assert isinstance(product, partial)
    (use,) = product.args
    rows, size = weight.shape[0], product.func.__self__.embed_dim  # type: ignore[attr-defined]
    if use == ATTENDED:
        return "out_proj"
    return {3: "in_proj", 2: "kv_proj"}.get(rows // size, ("q_proj", "k_proj", "v_proj")[use])


def _positions_first(
    query: Tensor, key: Tensor, value: Tensor, is_batched: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (positions, batch, features), the same objects where the same came in."""

    def arrange(x: Tensor) -> Tensor:
        if not is_batched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if batch_first else x

    first = arrange(query)
    second = first if key is query else arrange(key)
    return first, second, second if value is key else arrange(value)


def _merged(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores (batch, heads, queries, keys), or None for nothing."""
    merged = None
    if attention is not None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        merged = _added(attention, q.dtype)
        merged = merged if merged.ndim == 2 else merged.view(shape)
    if padding is not None:
        hidden = _added(padding, q.dtype)[:, None, None, :]
        merged = hidden if merged is None else merged + hidden
    return merged


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Return what is attended to, and the weights of attention."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


BYPASSES: Mapping[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""Modules, with subclasses, that in evaluation hand the weights inside them to a kernel; what keeps them from it."""

_BEFORE = "before_bypass_was_closed"


def close_bypasses(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let encoders compute by their modules in evaluation too; return those for which it is new."""
    closed = []
    for module in modules:
        own = {name: value for kind, (name, value) in BYPASSES.items() if isinstance(module, kind)}
        if own and _BEFORE not in vars(module):
            vars(module)[_BEFORE] = {name: vars(module)[name] for name in own if name in vars(module)}
            vars(module).update(own)
            closed.append(module)
    return closed


def open_bypasses(modules: Iterable[nn.Module]) -> None:
    """Let encoders compute as before they were closed."""
    for module in modules:
        vars(module).update(vars(module).pop(_BEFORE, {}))
