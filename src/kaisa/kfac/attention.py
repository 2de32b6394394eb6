"""``nn.MultiheadAttention``: four projections whose own modules are never called.

The module hands its packed weights to ``torch.nn.functional``, so that forward hooks on its children never fire (and
libraries that register them fail). Here PyTorch's own forward runs unchanged, with one name bound anew: where it calls
``linear``, a recording ``linear`` runs, which computes the same and notes input and output. Same kernels, same random
numbers, same result to the bit; no module-wide state, so that threads do not disturb one another.

A subclass that computes its projections otherwise has ``forward_with(watch, …)``: its forward, in which each of them is
``watch(product, x, weight, bias)``.

A packed weight (3E, E) is three layers, the queries', keys' and values' rows, with a G of E × E each, not of 3E × 3E.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.kfac.layers import Layer, LayerOptions, NotCovered, Projection, register, register_name

Record = Callable[[Layer, nn.Module, Tensor, Tensor, slice], None]


def projections(name: str, module: nn.MultiheadAttention, options: LayerOptions) -> list[Layer]:
    """Returns the projections of queries, keys, values and output as layers ``name.q_proj`` … ``name.out_proj``."""
    if module.bias_k is not None:
        raise NotCovered("add_bias_kv, whose parameters are no rows of a projection")
    if "forward" in vars(module) and not isinstance(vars(module)["forward"], RecordedForward):
        raise NotCovered("its forward is replaced by one of the user's")
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
register_name("kaisa.quantize.attention.QuantizedMultiheadAttention", projections)


@dataclass(frozen=True)
class Recorder:
    """Who wants to see the projections of one attention module, and whether they do just now."""

    layers: tuple[Projection, ...]
    record: Record
    is_active: Callable[[], bool]


class RecordedForward:
    """A module's ``forward``: its own, or the recording one while somebody wants to see.

    It copies and pickles as the module's own: a copy of the model is not ours to watch.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.recorders: list[Recorder] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = [recorder for recorder in self.recorders if recorder.is_active()]
        if not active:
            return type(self.module).forward(self.module, *args, **kwargs)
        linear = _RecordingLinear(self.module, active)
        forward_with: Any = getattr(self.module, "forward_with", None)
        if forward_with is not None:  # a subclass whose products are its own shows them itself
            return forward_with(linear.watch, *args, **kwargs)
        attention = _rebound(
            F.multi_head_attention_forward,
            # With a default device torch would hand the call on to the function that does not record.
            has_torch_function=lambda tensors: False,
            linear=linear,
            _in_projection=_rebound(vars(F)["_in_projection"], linear=linear),
            _in_projection_packed=_rebound(vars(F)["_in_projection_packed"], linear=linear),
        )
        return _rebound(nn.MultiheadAttention.forward, F=_Functional(attention))(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy: nn.MultiheadAttention = memo[id(self.module)]
        return partial(type(self.module).forward, copy)

    def __reduce__(self) -> Any:
        return partial, (type(self.module).forward, self.module)


def attach(module: nn.MultiheadAttention, recorder: Recorder) -> Callable[[], None]:
    """Shows a recorder every call of a module from now on, and returns what takes it off again."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, RecordedForward):
        forward = RecordedForward(module)
        module.forward = forward  # type: ignore[method-assign]
    forward.recorders.append(recorder)

    def remove() -> None:
        forward.recorders.remove(recorder)
        if not forward.recorders and module.__dict__.get("forward") is forward:
            del module.forward

    return remove


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
    def __init__(self, module: nn.MultiheadAttention, recorders: list[Recorder]) -> None:
        self.module = module
        self.recorders = recorders
        self.batch_size = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.watch(F.linear, x, weight, bias)

    def watch(self, product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = product(x, weight, bias)
        if x.ndim == 3:  # (positions, batch, in), as attention computes whatever batch_first says
            self.batch_size = x.shape[1]
            by_batch, output_by_batch = x, output
        else:  # the output projection sees (positions · batch, in)
            output = output.unflatten(0, (-1, self.batch_size))
            by_batch, output_by_batch = x.unflatten(0, (-1, self.batch_size)), output
        for recorder in self.recorders:
            for layer in recorder.layers:
                columns = _columns(layer, weight)
                if columns is not None:
                    recorder.record(layer, self.module, by_batch, output_by_batch, columns)
        return output if x.ndim == 3 else output.flatten(0, 1)


def _columns(layer: Projection, weight: Tensor) -> slice | None:
    """Returns which outputs of a product with ``weight``, the parameter or some rows of it, are the layer's."""
    parameter = layer.weight
    if weight is not parameter and weight._base is not parameter:
        return None
    first = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
    columns = slice(layer.range.start - first, layer.range.stop - first)
    return columns if columns.start >= 0 and columns.stop <= weight.shape[0] else None
