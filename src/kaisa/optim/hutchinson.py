"""Products of the Hessian with random probes, and what they tell of its diagonal (Hutchinson 1990).

    z    entries are independent, with mean 0 and variance 1
    Hz   the derivative of <gradient, z>, for all parameters at once: blocks between parameters are in it

The mean of z ∘ Hz is the diagonal; that of (Hz)² is the squared norm of each row, Σⱼ H²ᵢⱼ.

Probes come from a seed alone: the micro-batches of a step draw the same probe one after another, so that their
products add up to that of the whole batch, and so do ranks whose generators are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaisa.errors import DifferentiationError


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, eight of a random byte, for it is drawing that costs."""
    device, count = like.device, like.numel()
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    drawn = torch.empty(-(-count // 8), dtype=torch.int32, device=device).random_(0, 256, generator=generator)
    return (2 * bits - 1).to(like.dtype).index_select(0, drawn).view(-1)[:count].view(like.shape)


DISTRIBUTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "rademacher": _signs,
    "gaussian": lambda like, generator: torch.empty_like(like).normal_(generator=generator),
}

_ONCE = once_differentiable(lambda context: None).__code__
_REMEDY_ONCE = "write the backward of that torch.autograd.Function so that it can be differentiated itself"
_REMEDIES = (
    (
        r"derivative for (\S*scaled_dot_product\S*) is not implemented",
        "compute attention with plain matrix products: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    ),
    (r"derivative for (\S+) is not implemented", "replace it by operations that can be differentiated twice"),
    (
        r"Double backwards is not supported for (CuDNN RNNs)",
        "run the forward pass with torch.backends.cudnn.flags(enabled=False)",
    ),
    (r"marked with (@once_differentiable)", _REMEDY_ONCE),
    (r"(torch\.compile) with aot_autograd does not currently support double backward", "train the model uncompiled"),
    (
        r"(torch\.utils\.checkpoint|Checkpointing) is (?:incompatible|not compatible) with",
        "give torch.utils.checkpoint.checkpoint use_reentrant=False",
    ),
)


def draw(parameters: Sequence[Tensor], distribution: str, samples: int, seed: int) -> list[list[Tensor]]:
    """Return probes of the shapes of parameters, a list for every sample; a seed gives the same ones again.

    Those of one device and type are parts of one tensor, drawn at once. A complex probe has real and imaginary parts
    of variance 1, for it stands for two numbers.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(parameters):
        alike.setdefault((parameter.device, parameter.dtype), []).append(index)
    generators = {device: torch.Generator(device).manual_seed(seed) for device, _ in alike}
    probes: list[list[Tensor]] = [list(parameters) for _ in range(samples)]
    for sample in probes:
        for (device, dtype), indices in alike.items():
            sizes = [parameters[index].numel() for index in indices]
            like = torch.empty(sum(sizes), dtype=dtype, device=device)
            flat = DISTRIBUTIONS[distribution](
                torch.view_as_real(like) if dtype.is_complex else like, generators[device]
            )
            flat = torch.view_as_complex(flat) if dtype.is_complex else flat
            for index, part in zip(indices, flat.split(sizes), strict=True):
                sample[index] = part.view(parameters[index].shape)
    return probes


def nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield every node of a graph once."""
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)


def leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors to which ``loss.backward()`` would give a gradient."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    return [node.variable for node in nodes([loss.grad_fn]) if type(node).__name__ == "AccumulateGrad"]


def check_differentiable_twice(roots: Iterable[Tensor]) -> None:
    """Raise DifferentiationError where a function is marked as differentiable once.

    Autograd passes over such a function without a word where nothing else would be differentiated through it, and
    takes what it returns for constant.
    """
    for node in nodes(root.grad_fn for root in roots):
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise _refusal(f"{function.__qualname__}, marked @once_differentiable", _REMEDY_ONCE)
        if type(node).__name__ == "Error":
            raise _refusal("a function marked @once_differentiable", _REMEDY_ONCE)


def gradients(loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool) -> list[Tensor]:
    """Return gradients, such that can be differentiated again if a graph is made.

    Raises:
        DifferentiationError: something in the graph cannot be differentiated so.
    """
    return list(_differentiate([loss], inputs, None, create_graph=create_graph))


def product(
    attached: Sequence[Tensor], parameters: Sequence[Tensor], probe: Sequence[Tensor], *, last: bool
) -> list[Tensor]:
    """Return Hz of every parameter, zero where the gradients do not depend on it.

    Args:
        attached: gradients with their graph; those that are constant have none and are passed over.
        parameters: by which to differentiate.
        probe: z of every gradient.
        last: whether the graph may be freed.

    Raises:
        DifferentiationError: an operation has no second derivative.
    """
    varying = [index for index, gradient in enumerate(attached) if gradient.requires_grad]
    if not varying:
        return [torch.zeros_like(parameter) for parameter in parameters]
    outputs, probes = [attached[index] for index in varying], [probe[index] for index in varying]
    found = _differentiate(outputs, parameters, probes, retain_graph=not last, materialize_grads=True)
    return list(found)


def _differentiate(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Any, **options: Any) -> Any:
    try:
        return torch.autograd.grad(outputs, inputs, grads, **options)
    except RuntimeError as error:
        for pattern, remedy in _REMEDIES:
            if found := re.search(pattern, str(error)):
                raise _refusal(found.group(1), remedy) from error
        raise


def _refusal(operation: str, remedy: str) -> DifferentiationError:
    return DifferentiationError(
        f"the Hessian cannot be computed through {operation}, which has no second derivative; {remedy}; or take "
        "differences of gradients: optimizer.backward_by_difference(closure)"
    )


def accumulate_(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add to ``.grad`` as a backward pass does, so that what waits for gradients, as DistributedDataParallel, runs.

    Hooks on the tensors themselves have run when the gradients were computed; they are silent here.
    """
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(one) for one in hooks]
    try:
        for one in hooks:
            one.clear()
        torch.autograd.backward(tensors, [gradient.detach() for gradient in grads])
    finally:
        for one, hook in zip(hooks, kept, strict=True):
            one.update(hook)
