"""Models: their layers by name, their digest, and leaving them as they were found.

A model that is explained is evaluated in evaluation mode with gradients of its own. `undisturbed` puts back
everything that this touches (the mode of every module, `.grad` and `requires_grad` of every parameter, buffers and all
hooks), whether the explanation came about or not.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.curvature import outputs_of
from kaisa.errors import ConfigurationError
from kaisa.modes import evaluating

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_non_full_backward_hooks",
)


@contextmanager
def undisturbed(model: nn.Module | None) -> Iterator[None]:
    """Put a model in evaluation mode for a while, then leave it as it was, also after errors."""
    if model is None:
        yield
        return
    hooks = [(module, name, OrderedDict(getattr(module, name, ()))) for module in model.modules() for name in HOOKS]
    full = [(module, getattr(module, "_is_full_backward_hook", None)) for module in model.modules()]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with evaluating(model), _recurrent_gradients(model):
            yield
    finally:
        for module, name, kept in hooks:
            _restore_hooks(module, name, kept)
        for module, is_full in full:
            module._is_full_backward_hook = is_full
        for parameter, gradient, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, as `named_modules` has it.

    Raises:
        ConfigurationError: there is none; the message lists names that are close.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules or not name:
        some = difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or [key for key in modules if key][:5]
        raise ConfigurationError(
            f"the model has no layer {name!r}; there are, among others, {', '.join(some)}; see model.named_modules()"
        )
    return modules[name]


class Capture:
    """Keeps what a module gives, as long as it is open.

    The rest of the model gets a copy, so that what is kept is what the layer gave, also before a ReLU in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Capture:
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            self.outputs.append(outputs_of(output))
            return output
        self.outputs.append(_differentiable(first))
        return _with_first(output, self.outputs[-1].clone())

    @property
    def output(self) -> Tensor:
        """The last output.

        Raises:
            ConfigurationError: the module was not called.
        """
        if not self.outputs:
            raise ConfigurationError(
                f"the layer ({type(self._module).__name__}) is not called in the forward pass of this model; "
                "name a layer that is"
            )
        return self.outputs[-1]


def sensible_layer(model: nn.Module, score: Callable[[], Tensor]) -> str:
    """Return the name of the last layer that still has places, at more than one of which it bears on the score.

    A layer has places if its output is a feature map (four dimensions or more) or has one vector for each token or
    position (three). Where both occur, feature maps are preferred. The score decides what is last: after the layer that
    is found, the model has pooled, or looks at one place only (the class token of a transformer).

    Args:
        model: the model.
        score: calls the model once and returns its explained score.

    Raises:
        ConfigurationError: there is no such layer.
    """
    seen: list[tuple[str, Tensor]] = []
    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(_note(seen, name)) for name, module in named]
    try:
        with torch.enable_grad():
            total = score().sum()
    finally:
        for handle in handles:
            handle.remove()
    places = [(name, output) for name, output in seen if output.requires_grad and _has_places(output)]
    if places:
        gradients = torch.autograd.grad(total, [output for _, output in places], allow_unused=True)
        bearing = [
            (name, output)
            for (name, output), gradient in zip(places, gradients, strict=True)
            if gradient is not None and _bears_at_places(gradient)
        ]
        maps = [name for name, output in bearing if output.dim() > 3]
        if bearing:
            return maps[-1] if maps else bearing[-1][0]
    raise ConfigurationError(
        "no layer of the model has a feature map, or a vector for each token, that bears on the score; name one by "
        "layer=, or use a method that needs none (integrated_gradients)"
    )


def _has_places(output: Tensor) -> bool:
    return (output.dim() > 3 and output.shape[2:].numel() > 1) or (output.dim() == 3 and min(output.shape[1:]) > 1)


def _bears_at_places(gradient: Tensor) -> bool:
    """Tell whether more than one place of a layer bears on the score; of three dimensions either may be the places."""
    if gradient.dim() > 3:
        return int((gradient[0] != 0).any(0).sum()) > 1
    return all(int((gradient[0] != 0).any(axis).sum()) > 1 for axis in (0, 1))


def digest(model: nn.Module | None) -> str:
    """Return the SHA-256 of the names, shapes and numbers of a model's weights and buffers; nothing for a function."""
    if model is None:
        return ""
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            numbers = value.detach().cpu().contiguous()
            state.update(f"{name} {numbers.dtype} {tuple(numbers.shape)};".encode())
            state.update(numbers.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def device_of(model: nn.Module | None) -> torch.device:
    """Return where the model's weights are; the CPU for a function and for a model without weights."""
    tensors = () if model is None else (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _note(seen: list[tuple[str, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        tensors = [item for item in (output if isinstance(output, tuple) else (output,)) if isinstance(item, Tensor)]
        if tensors and tensors[0].is_floating_point():
            seen.append((name, _differentiable(tensors[0])))
            # The rest gets a copy: an operation in place would change what was seen.
            return _with_first(output, seen[-1][1].clone()) if tensors[0] is _first(output) else output
        return output

    return hook


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


def _differentiable(output: Tensor) -> Tensor:
    """Return an output by which gradients can be taken, also where no parameter before it requires any."""
    if torch.is_grad_enabled() and output.is_floating_point() and not output.requires_grad:
        return output.detach().requires_grad_()
    return output


def _restore_hooks(module: nn.Module, name: str, kept: OrderedDict[int, Any]) -> None:
    hooks = getattr(module, name, None)
    if hooks is not None and dict(hooks) != dict(kept):
        hooks.clear()
        hooks.update(kept)


def _recurrent_gradients(model: nn.Module) -> Any:
    """CuDNN gives no gradients of recurrent layers in evaluation mode: without it there are."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
