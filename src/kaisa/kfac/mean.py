"""Factors at fixed weights: the mean over a data set, made once when training is over.

Running averages mix the weights of many steps. What asks for the curvature of *one* network (a posterior, influence
functions, a bound) wants A = E[a aᵀ] and G = E[δ δᵀ] over all examples at the weights as they are:

    factors = mean_factors(model, batches, fisher="categorical")
    factors.label    Label(average='mean', fisher='categorical', sharing='expand', examples=50000)

The weights, gradients, buffers and modes of the model stay as they were, and no hook stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.kfac import fisher as fishers
from kaisa.kfac.capture import Capture
from kaisa.kfac.clock import Clock
from kaisa.kfac.coverage import discover, unwrapped
from kaisa.kfac.factors import Factors, Label, Statistics
from kaisa.kfac.fisher import Fisher
from kaisa.kfac.layers import Layer, LayerOptions
from kaisa.modes import evaluating

SummedLoss = Callable[[Tensor, Any], Tensor]
"""Outputs and targets of a batch to the loss summed over its examples."""


def mean_factors(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    fisher: str | Fisher = "categorical",
    loss: SummedLoss | None = None,
    sharing: str = "expand",
    layer_options: LayerOptions | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Factors:
    """Returns the factors of every layer, averaged over a data set at the model's weights as they are.

    Args:
        model: in any mode; it is run in evaluation mode.
        batches: inputs, or tuples (inputs, targets); the first dimension of the inputs counts the examples.
        fisher: "categorical", "gaussian" or "bernoulli" with labels drawn from the model's prediction, a ``Fisher``
            with ``exact=True`` for the expectation over them, or "empirical" for the labels of the data.
        loss: of the empirical Fisher alone: outputs and targets to the sum of the losses.
        sharing: "expand" or "reduce".
        layer_options: which layers; all that have a rule unless given.
        dtype: of the sums; at least float32.
        seed: of the labels that are drawn.
        progress: told after every batch how many examples are done.

    Raises:
        ConfigurationError: no layer has a rule, or the empirical Fisher has no loss and targets.
        DataError: there is no example, or the factors are not finite.
    """
    kind = fishers.named(fisher)
    if (kind.kind == "empirical") != (loss is not None):
        raise ConfigurationError(
            "the empirical Fisher needs loss=, outputs and targets to the sum of the losses; the others take no loss"
        )
    plain = unwrapped(model)
    layers, coverage = discover(plain, layer_options or LayerOptions(), (), sharing, sharing)
    if not layers:
        raise ConfigurationError(f"no layer of the model has a rule for its factors:\n{coverage}")
    sums: dict[str, Statistics] = {}
    with _captured(plain, layers, dtype, seed, is_sampled=loss is None) as capture:
        generator = torch.Generator().manual_seed(seed)
        for batch in batches:
            _differentiate(plain, batch, layers, capture, kind, loss, generator)
            for name, found in capture.take().items():
                sums[name].add_(found) if name in sums else sums.update({name: found})
            if progress is not None:
                progress(_examples(sums))
    if not sums:
        raise DataError("there are no examples to average over; give at least one batch")
    return _averaged(layers, sums, Label("mean", _name(kind), sharing, _examples(sums)))


@contextmanager
def _captured(
    model: nn.Module, layers: list[Layer], dtype: torch.dtype | None, seed: int, *, is_sampled: bool
) -> Iterator[Capture]:
    capture = Capture(
        model,
        layers,
        reduction="sum",
        terms=lambda: None,
        loss_scale=lambda device: 1.0,
        fraction=1.0,
        dtype=dtype,
        seed=seed,
        clock=Clock(),
    )
    if is_sampled:
        capture.expect_sampled()
    capture.active = True
    try:
        with evaluating(model), torch.enable_grad():
            yield capture
    finally:
        capture.close()


def _differentiate(
    model: nn.Module,
    batch: Any,
    layers: list[Layer],
    capture: Capture,
    fisher: Fisher,
    loss: SummedLoss | None,
    generator: torch.Generator,
) -> None:
    inputs, targets = batch if isinstance(batch, list | tuple) and len(batch) > 1 else (_only(batch), None)
    parameters = [parameter for layer in layers for parameter in layer.parameters if parameter.requires_grad]
    device = parameters[0].device
    outputs = model(inputs.to(device))
    if loss is not None:
        if targets is None:
            raise ConfigurationError("the empirical Fisher needs targets; give batches of (inputs, targets)")
        total = loss(outputs, targets.to(device) if isinstance(targets, Tensor) else targets)
        torch.autograd.grad(total, parameters, allow_unused=True)
        return
    for index, gradient in enumerate(fisher.output_gradients(outputs, generator)):
        with capture.sampling(with_inputs=index == 0):
            torch.autograd.grad(outputs, parameters, gradient, retain_graph=True, allow_unused=True)


def _only(batch: Any) -> Tensor:
    found = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(found, Tensor):
        raise DataError(f"a batch is {type(found).__name__}; give tensors, or tuples of inputs and targets")
    return found


def _averaged(layers: list[Layer], sums: dict[str, Statistics], label: Label) -> Factors:
    factors = Factors(label)
    for layer in layers:
        if layer.name in sums:
            pair = layer.pair(sums[layer.name])
            for name, factor in zip("AG", pair, strict=True):
                if not bool(torch.isfinite(factor).all()):
                    raise DataError(f"{name} of layer {layer.name} is not finite; look at the weights and the inputs")
            factors.update(layer.name, pair, 0.0)
    return factors


def _examples(sums: dict[str, Statistics]) -> int:
    return int(max((float(found.examples) for found in sums.values()), default=0.0))


def _name(fisher: Fisher) -> str:
    return f"exact {fisher.kind}" if fisher.exact else fisher.kind
