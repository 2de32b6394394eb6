"""``nn.MultiheadAttention``: four projections whose own modules are never called.

The module hands its packed weights to ``torch.nn.functional``, so that forward hooks on its children never fire (and
libraries that register them fail). Here PyTorch's own forward runs unchanged, with one name bound anew: where it calls
``linear``, a recording ``linear`` runs, which computes the same and notes input and output. Same kernels, same random
numbers, same result to the bit; no module-wide state, so that threads do not disturb one another.

A packed weight (3E, E) is three layers, the queries', keys' and values' rows, with a G of E × E each, not of 3E × 3E.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.kfac.layers import Layer, LayerOptions, NotCovered, Projection, register

Record = Callable[[Layer, nn.Module, Tensor, Tensor, slice], None]


def projections(name: str, module: nn.MultiheadAttention, options: LayerOptions) -> list[Layer]:
    """Returns the projections of queries, keys, values and output as layers ``name.q_proj`` … ``name.out_proj``."""
    if module.bias_k is not None:
        raise NotCovered("add_bias_kv, whose parameters are no rows of a projection")
    size, bias = module.embed_dim, module.in_proj_bias
    layers: list[Layer] = []
    packed: nn.Parameter | None = module._parameters["in_proj_weight"]
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(index * size, (index + 1) * size)
        weight = getattr(module, f"{part}_weight") if packed is None else packed
        own_rows = slice(0, size) if packed is None else rows
        layers.append(Projection(f"{name}.{part}", module, weight, bias, options, own_rows, rows))
    out = module.out_proj
    everything = slice(0, size)
    out_weight: nn.Parameter = getattr(out, "weight")  # noqa: B009 - declared as a plain tensor
    layers.append(Projection(f"{name}.out_proj", module, out_weight, out.bias, options, everything, everything))
    return layers


register(nn.MultiheadAttention, projections)


def recorded_forward(
    module: nn.MultiheadAttention, layers: list[Projection], record: Record
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns a forward that computes what the module computes and records every projection."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        linear = _RecordingLinear(module, layers, record)
        attention = _rebound(
            F.multi_head_attention_forward,
            linear=linear,
            _in_projection=_rebound(vars(F)["_in_projection"], linear=linear),
            _in_projection_packed=_rebound(vars(F)["_in_projection_packed"], linear=linear),
        )
        functional = _Functional(attention)
        result: tuple[Tensor, Tensor | None] = _rebound(nn.MultiheadAttention.forward, F=functional)(
            module, *args, **kwargs
        )
        return result

    return forward


def _rebound(function: Any, **names: Any) -> Any:
    """Returns a copy of a Python function that sees other values under some of its global names."""
    copy = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Functional:
    """``torch.nn.functional`` with another ``multi_head_attention_forward``."""

    def __init__(self, attention: Any) -> None:
        self.multi_head_attention_forward = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _RecordingLinear:
    def __init__(self, module: nn.MultiheadAttention, layers: list[Projection], record: Record) -> None:
        self.module = module
        self.layers = layers
        self.record = record
        self.batch_size = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        if x.ndim == 3:  # (positions, batch, in), as attention computes whatever batch_first says
            self.batch_size = x.shape[1]
            by_batch, output_by_batch = x, output
        else:  # the output projection sees (positions · batch, in)
            output = output.unflatten(0, (-1, self.batch_size))
            by_batch, output_by_batch = x.unflatten(0, (-1, self.batch_size)), output
        for layer in self.layers:
            columns = _columns(layer, weight)
            if columns is not None:
                self.record(layer, self.module, by_batch, output_by_batch, columns)
        return output if x.ndim == 3 else output.flatten(0, 1)


def _columns(layer: Projection, weight: Tensor) -> slice | None:
    """Returns which outputs of a product with ``weight``, the parameter or some rows of it, are the layer's."""
    parameter = layer.weight
    if weight is not parameter and weight._base is not parameter:
        return None
    first = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
    columns = slice(layer.range.start - first, layer.range.stop - first)
    return columns if columns.start >= 0 and columns.stop <= weight.shape[0] else None
