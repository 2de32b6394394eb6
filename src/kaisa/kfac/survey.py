"""What K-FAC will cover of a model, by one forward pass of a copy that has no storage: what a plan is made from.

    model ─► copy on the meta device ─► layers ─► forward pass under hooks ─► rows, operations of each layer
                                                                          └─► operations of the pass

Nothing is computed and nothing is allocated, so that a model larger than this machine can be planned; the user's model
is not touched. A forward pass that looks at values needs a device that has some.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.flop_counter import FlopCounterMode

from kaisa.errors import ConfigurationError
from kaisa.kfac.attention import Recorder, attach
from kaisa.kfac.coverage import discover, unwrapped
from kaisa.kfac.layers import (
    EXPAND,
    REDUCE,
    Convolution,
    Embedding,
    Layer,
    LayerOptions,
    Projection,
    TiedEmbedding,
)
from kaisa.kfac.norms import Norm
from kaisa.kfac.workload import LayerWork, Workload

META = torch.device("meta")


def survey(
    model: nn.Module,
    example_inputs: Any,
    *,
    name: str | None = None,
    layer_options: LayerOptions | None = None,
    skip_layers: str | Sequence[str] = (),
    sharing: str = EXPAND,
    norm_sharing: str = REDUCE,
    device: torch.device | str = META,
) -> Workload:
    """Returns what a model asks of K-FAC in one step.

    Args:
        model: as it is trained, on any device; one built under ``torch.device("meta")`` never takes any memory.
        example_inputs: of one micro-batch on one rank: a tensor, a tuple of arguments or a mapping of named ones.
        name: for reports; the model's type unless given.
        layer_options, skip_layers, sharing: as for ``KFACPreconditioner``.
        norm_sharing: the treatment of normalisation layers; "expand" for losses with more terms than examples.
        device: where the forward pass of the copy runs; any but the meta device computes in earnest, for models that
            look at values.

    Raises:
        ConfigurationError: the model cannot be copied or looks at values that the meta device has not, or no layer can
            be preconditioned.
    """
    device = torch.device(device)
    plain = _copied(unwrapped(model), device)
    patterns = [re.compile(text) for text in ([skip_layers] if isinstance(skip_layers, str) else skip_layers)]
    layers, coverage = discover(plain, layer_options or LayerOptions(), patterns, sharing, norm_sharing)
    if not layers:
        raise ConfigurationError(f"no layer can be preconditioned:\n{coverage}")
    arguments, named = _arguments(_moved(example_inputs, device))
    calls, operations = _run(plain, layers, arguments, named, device)
    return Workload(
        name or type(unwrapped(model)).__name__,
        tuple(_work(layer, [call for call in calls if call.layer is layer]) for layer in layers),
        operations,
        sum(parameter.numel() for parameter in plain.parameters()),
        _batch_size((arguments, named)),
    )


@dataclass(frozen=True)
class _Call:
    """One use of a layer in the forward pass; ``x`` and ``delta`` are on the meta device."""

    layer: Layer
    module: nn.Module
    x: Tensor
    delta: Tensor


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns a copy of a model on a device; its tensors are never copied where they are."""
    tensors = chain(
        model.parameters(),
        model.buffers(),
        (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)),
    )
    # A deep copy takes what its memo has for an object in place of a copy, so that shared tensors stay shared.
    memo = {id(tensor): _tensor_on(tensor, device) for tensor in tensors if not isinstance(tensor, _WITHOUT_SHAPE)}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be copied, which planning needs: {_first_line(error)}"
        ) from error


_WITHOUT_SHAPE = (UninitializedParameter, nn.parameter.UninitializedBuffer)


def _tensor_on(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    return value


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _run(
    model: nn.Module,
    layers: Sequence[Layer],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
    device: torch.device,
) -> tuple[list[_Call], float]:
    """Runs the forward pass of a copy; returns the calls of its layers, and its additions and multiplications."""
    calls: list[_Call] = []
    _watch(layers, calls.append)
    # With gradients, as in training: without them attention in evaluation mode takes a path that hides its layers.
    with (
        torch.device(device),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.enable_grad(),
        _counter() as counter,
    ):
        try:
            model(*arguments, **named)
        except RuntimeError as error:
            if device != META:
                raise
            raise ConfigurationError(
                f"the forward pass of {type(model).__name__} fails where tensors have shapes but no values: "
                f"{_first_line(error)}; if it looks at values, give device='cpu'"
            ) from error
    return calls, float(counter.get_total_flops())


def _counter() -> FlopCounterMode:
    """Returns what counts additions and multiplications, those of products that add in place too."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _batched_product})


def _batched_product(_: torch.Size, left: torch.Size, right: torch.Size, **rest: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _watch(layers: Sequence[Layer], note: Callable[[_Call], None]) -> None:
    by_module: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        for module in layer.modules:
            by_module.setdefault(module, []).append(layer)
    for module, its_layers in by_module.items():
        if isinstance(module, nn.MultiheadAttention):
            projections = tuple(layer for layer in its_layers if isinstance(layer, Projection))
            attach(module, Recorder(projections, _note_projection(note), lambda: True))
        else:
            module.register_forward_hook(_note_call(its_layers, note), with_kwargs=True)


def _note_call(layers: Sequence[Layer], note: Callable[[_Call], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        for layer in layers:
            note(_Call(layer, module, _shape_of(x), _shape_of(output)))

    return hook


def _note_projection(note: Callable[[_Call], None]) -> Callable[..., None]:
    def record(layer: Layer, module: nn.Module, x: Tensor, output: Tensor, columns: slice) -> None:
        note(_Call(layer, module, _shape_of(x).transpose(0, 1), _shape_of(output)[..., columns].transpose(0, 1)))

    return record


def _shape_of(x: Tensor) -> Tensor:
    return torch.empty_like(x.detach(), device=META)


def _work(layer: Layer, calls: Sequence[_Call]) -> LayerWork:
    """Returns what the calls of one layer bring, by making their statistics without values."""
    rows = 0
    operations: Counter[str] = Counter()
    for call in calls:
        if isinstance(layer, Norm):
            rows += call.x.numel() // layer.weight.numel()
            continue
        dtype = layer.summed_in(None)
        x, delta = (part.to(dtype) if part.is_floating_point() else part for part in (call.x, call.delta))
        with torch.no_grad(), _counter() as counter:
            statistics = layer.statistics(call.module, x, delta)
        rows += int(statistics.positions) or x.numel()
        operations["statistics"] += counter.get_total_flops()
    is_convolution = isinstance(layer, Convolution)
    return LayerWork(
        layer.layer_shape(),
        rows,
        _kind(layer),
        _stride_one_kernel(layer) if isinstance(layer, Convolution) else (),
        float(operations["statistics"]) if is_convolution and calls else None,
    )


def _kind(layer: Layer) -> str:
    kinds = {Convolution: "convolution", Norm: "norm", Embedding: "embedding", TiedEmbedding: "embedding"}
    return next((name for kind, name in kinds.items() if isinstance(layer, kind)), "linear")


def _stride_one_kernel(layer: Convolution) -> tuple[int, ...]:
    geometry = layer.geometry
    return geometry.kernel if not geometry.transposed and set(geometry.stride) == {1} else ()


def _batch_size(value: Any) -> int:
    """Returns the length of the first tensor found, 1 without any."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else 1
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, list | tuple):
        return next(
            (_batch_size(part) for part in parts if isinstance(part, Tensor | Mapping | list | tuple) and len(part)), 1
        )
    return 1


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
