"""A model in few bits and back: the modules stay, their classes change.

    prepare(model, QuantConfig(…))  ─►  set_mode(model, "exact" | "qat" | "fqt")  ─►  convert(model)

Parameters keep their identity, so that optimizers, DistributedDataParallel, hooks and K-FAC may come before or after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kaisa.errors import ConfigurationError, StateError
from kaisa.quantize.attention import QuantizedMultiheadAttention, close_bypasses, open_bypasses
from kaisa.quantize.config import MODES, RUNNING, QuantConfig, check_choice
from kaisa.quantize.layers import (
    RANGE,
    Quantization,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedLayer,
    QuantizedLinear,
)

TYPES: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}
"""What each type becomes: by exact type, because a subclass may compute something else."""

WRAPPERS: Mapping[str, str] = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Types that wrap a module, by name, so that none is loaded for it; and as what they hold it."""

_BACK: Mapping[type[nn.Module], type[nn.Module]] = {after: before for before, after in TYPES.items()}


def prepare(model: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """Make a model compute in few bits, in place.

    A model that is prepared already gets the new options. Layers are quantised that are exactly of one of the types
    Linear, Conv1d, Conv2d, Conv3d and MultiheadAttention of ``torch.nn``; subclasses of these, and weights that are
    used by functions, stay in float. With ``ranges="running"`` evaluation before any training, or `load_ranges`, takes
    the ranges of its batch.

    Args:
        model: the model, perhaps inside DistributedDataParallel.
        config: what is quantised; None for the defaults.

    Returns:
        The same model.

    Raises:
        ConfigurationError: a layer cannot be quantised, there is none, or a name or pattern in the options is that of
            none; then nothing has changed.
    """
    config = config or QuantConfig()
    layers = list(quantizable(model))
    idle = config.idle_patterns((name, kind) for name, _, kind in layers)
    if layers and idle:
        raise ConfigurationError(
            f"skip_layers has {idle[0]!r}, which fits no layer; such are {', '.join(name for name, _, _ in layers)}"
        )
    chosen = {name: module for name, module, kind in layers if not config.skips(name, module, kind)}
    for name, module in chosen.items():
        _check(name, module)
    _check_names(chosen, config)
    convert(model)
    for name, module in chosen.items():
        _quantize(name, module, config)
    close_bypasses(model.modules())
    return model


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Make the layers in few bits compute as the float model ("exact"), or in "qat" or "fqt"; return the model.

    Raises:
        ConfigurationError: there is no such mode, or no layer in few bits.
    """
    check_choice("mode", mode, MODES)
    layers = quantized_layers(model)
    if not layers:
        raise ConfigurationError("the model has no layers in few bits; call prepare(model, config) first")
    for layer in layers.values():
        layer.quantization.mode = mode
    return model


def convert(model: nn.Module) -> nn.Module:
    """Turn a prepared model back into the float model, in place; return it. A float model stays as it is."""
    for layer in quantized_layers(model).values():
        del layer.quantization
        layer._buffers.pop(RANGE, None)
        layer._non_persistent_buffers_set.discard(RANGE)
        layer.__class__ = _BACK[type(layer)]  # type: ignore[assignment]
    open_bypasses(model.modules())
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by name, without what DistributedDataParallel, torch.compile and checkpointing put into names."""
    plain: dict[str, str] = {}
    held: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        own = "" if last in held.get(parent, ()) else last
        plain[name] = ".".join(filter(None, (plain.get(parent), own)))
        held[name] = _held_by(module)
        yield plain[name], module


def _held_by(module: nn.Module) -> list[str]:
    """Return as what a module holds another that it wraps."""
    return [WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in WRAPPERS]


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Yield the name of each layer that can be quantised, the layer and the type of its float form."""
    for name, module in named_modules(model):
        kind = getattr(module, "cls_to_become", None) or _BACK.get(type(module), type(module))
        if kind in TYPES:
            yield name, module, kind


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers in few bits by name."""
    return {name: module for name, module in named_modules(model) if isinstance(module, QuantizedLayer)}


def ranges_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running ranges by layer, which ``state_dict`` leaves out so that any float model fits it."""
    found = {name: layer._buffers.get(RANGE) for name, layer in quantized_layers(model).items()}
    return {name: ranges.clone() for name, ranges in found.items() if ranges is not None}


def load_ranges(model: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """Set the running ranges to those that ``ranges_of`` returned.

    Raises:
        StateError: they are those of other layers, or of other shapes; then nothing has changed.
    """
    own = ranges_of(model)
    if own.keys() != ranges.keys():
        strangers = sorted(own.keys() ^ ranges.keys())
        raise StateError(
            f"the ranges are of {len(ranges)} layers, the model has {len(own)}; only one of the two has {strangers[0]}"
        )
    for name, value in ranges.items():
        if value.shape != own[name].shape:
            raise StateError(
                f"the ranges of {name} have the shape {tuple(value.shape)}, the model's {tuple(own[name].shape)}"
            )
    layers = quantized_layers(model)
    for name, value in ranges.items():
        buffer = layers[name]._buffers[RANGE]
        assert buffer is not None
        buffer.copy_(value)


def _check(name: str, module: nn.Module) -> None:
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise ConfigurationError(f"{name} has no shapes yet; run one forward pass through the model first")
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        raise ConfigurationError(
            f"{name} has add_bias_kv or add_zero_attn, which are not supported in few bits; name it in skip_layers"
        )


def _check_names(chosen: Mapping[str, nn.Module], config: QuantConfig) -> None:
    if not chosen:
        raise ConfigurationError(
            f"no layer is left to be quantised; {', '.join(kind.__name__ for kind in TYPES)} would be, if skip_layers "
            "left one"
        )
    if isinstance(config.gradient_bits, Mapping):
        strangers = sorted(config.gradient_bits.keys() - chosen.keys())
        if strangers:
            raise ConfigurationError(
                f"gradient_bits names {strangers[0]!r}, which is no layer to be quantised; such are {', '.join(chosen)}"
            )


def _quantize(name: str, module: nn.Module, config: QuantConfig) -> None:
    module.__class__ = TYPES[type(module)]
    module.quantization = Quantization(config, config.branches(name), config.mode)  # type: ignore[assignment]
    if config.ranges == RUNNING and config.activation_bits is not None:
        device = next(module.parameters()).device
        uses = 4 if isinstance(module, nn.MultiheadAttention) else 1
        module.register_buffer(RANGE, torch.full((uses, 2), torch.nan, device=device), persistent=False)
