"""Class activation maps: the channels of a layer, weighted by what they mean for the score.

With activations A (channels k, places i) and their gradients G = ∂S/∂A, a map is ReLU(Σ_k w_k A_k), where

    gradcam      w_k = mean over i of G                                              (Selvaraju and others 2017)
    gradcam++    w_k = Σ_i α ReLU(G),  α = G² / (2 G² + (Σ_i A) G³), 0 where G = 0   (Chattopadhay and others 2018)
    scorecam     w = softmax over k of S(x ∘ M_k) − S(x′),  M_k = A_k enlarged, scaled to 0…1   (Wang and others 2020)

The published α also holds exp(S), which cancels when the map is scaled and overflows when it is not: it is left out.
Score-CAM in its first version took w_k = softmax over classes of f(x ∘ M_k): `weights="classes"`.
Captum has Grad-CAM alone, with channels first; layers with channels last (tokens) are weighted here, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.explain.modules import Capture, find_module, sensible_layer
from kaisa.explain.registry import method
from kaisa.explain.subject import Outcome, Subject

ENLARGEMENTS = {1: "linear", 2: "bilinear", 3: "trilinear"}


@method("gradcam", scope="local", needs="layer", summary="channels of a layer, weighted by their mean gradients")
def gradcam(subject: Subject, *, layer: str | None = None, channels: str | None = None, scaled: bool = True) -> Outcome:
    """Explain by Grad-CAM.

    Args:
        subject: what is explained.
        layer: the name of a module, as `named_modules` has it; by default the last that still has places.
        channels: `first` or `last` dimension of the layer's output; by default last where the model works on tokens.
        scaled: scale each map to 0…1.
    """
    return _by_gradients(subject, layer, channels, scaled, gradcam_weights)


@method("gradcam++", scope="local", needs="layer", summary="Grad-CAM that counts every place that speaks for the class")
def gradcam_plus_plus(
    subject: Subject, *, layer: str | None = None, channels: str | None = None, scaled: bool = True
) -> Outcome:
    """Explain by Grad-CAM++; options as `gradcam`."""
    return _by_gradients(subject, layer, channels, scaled, gradcam_plus_plus_weights)


@method(
    "scorecam", scope="local", needs="layer", summary="channels of a layer, weighted by the score of what they show"
)
def scorecam(
    subject: Subject,
    *,
    layer: str | None = None,
    channels: str | None = None,
    scaled: bool = True,
    weights: str = "channels",
) -> Outcome:
    """Explain by Score-CAM: no gradients, one forward pass for each channel.

    Args:
        subject: what is explained.
        layer: as `gradcam`.
        channels: as `gradcam`.
        scaled: as `gradcam`.
        weights: `channels` for the published softmax over channels, `classes` for that of the first version.
    """
    if weights not in ("channels", "classes"):
        raise ConfigurationError(f"weights is {weights!r}; expected channels or classes")
    if not subject.inputs.tensor.is_floating_point():
        raise ConfigurationError("scorecam hides parts of inputs, which tokens are not; use gradcam")
    name, module = _layer(subject, layer)
    maps = []
    for row in range(len(subject.inputs)):
        one = subject.one(row)
        with Capture(module) as capture, torch.no_grad():
            one.outputs(one.inputs.tensor)
        activations = _channels_first(one, capture.output, channels)
        found = _channel_weights(one, activations, weights)
        maps.append(weighted_map(activations, found))
        subject.report(row + 1, len(subject.inputs))
    return _outcome(subject, torch.cat(maps), name, scaled)


def gradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the weight of each channel, its mean gradient: (inputs, channels, places…) to (inputs, channels)."""
    return gradients.flatten(2).mean(2)


def gradcam_plus_plus_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the weight of each channel: the sum of its positive gradients, weighted by α."""
    a, g = activations.flatten(2), gradients.flatten(2)
    below = 2 * g**2 + a.sum(2, keepdim=True) * g**3
    alpha = torch.where(below == 0, 0.0, g**2 / torch.where(below == 0, 1.0, below))
    return (alpha * g.relu()).sum(2)


def weighted_map(activations: Tensor, weights: Tensor) -> Tensor:
    """Return ReLU(Σ_k w_k A_k) for each input."""
    return torch.einsum("nk,nk...->n...", weights, activations).relu()


def scorecam_weights(scores: Tensor) -> Tensor:
    """Return the softmax over channels of what each channel's mask scores; a baseline's score would cancel."""
    return scores.softmax(-1)


def _by_gradients(
    subject: Subject, layer: str | None, channels: str | None, scaled: bool, weigh: Callable[[Tensor, Tensor], Tensor]
) -> Outcome:
    name, module = _layer(subject, layer)
    maps = []
    for row in range(len(subject.inputs)):
        one = subject.one(row)
        with Capture(module) as capture, torch.enable_grad():
            score = one.chosen(one.outputs(one.inputs.tensor)).sum()
        try:
            (gradients,) = torch.autograd.grad(score, capture.output)
        except RuntimeError as error:
            raise ConfigurationError(f"the output of layer {name} does not bear on the score: {error}") from error
        activations, gradients = (
            _channels_first(one, found, channels) for found in (capture.output.detach(), gradients)
        )
        maps.append(weighted_map(activations, weigh(activations, gradients)))
        subject.report(row + 1, len(subject.inputs))
    return _outcome(subject, torch.cat(maps), name, scaled)


def _layer(subject: Subject, layer: str | None) -> tuple[str, nn.Module]:
    assert subject.model is not None
    if layer is None:
        one = subject.one(0)
        layer = sensible_layer(subject.model, lambda: one.chosen(one.outputs(one.inputs.tensor)))
    return layer, find_module(subject.model, layer)


def _channels_first(subject: Subject, output: Tensor, channels: str | None) -> Tensor:
    """Return a layer's output as (inputs, channels, places…).

    Raises:
        ConfigurationError: the output has no places, or `channels` is unknown.
    """
    if channels not in (None, "first", "last"):
        raise ConfigurationError(f"channels is {channels!r}; expected first or last")
    if output.dim() < 3:
        raise ConfigurationError(
            f"the layer gives {tuple(output.shape)}, which has no places; name a layer that gives (inputs, channels, "
            "places…) or (inputs, tokens, channels)"
        )
    if channels is None:
        assert subject.model is not None
        sequential = output.dim() == 3 and not any(isinstance(part, nn.Conv1d) for part in subject.model.modules())
        channels = "last" if sequential else "first"
    return output.movedim(-1, 1) if channels == "last" else output


def _channel_weights(subject: Subject, activations: Tensor, weights: str) -> Tensor:
    """Return the weight of each channel by the score of the input seen through the channel."""
    data = subject.inputs.tensor.to(activations.device)
    masks = _unit(_enlarged(activations[0][:, None], data))[:, 0]  # (channels, places of the input)
    scores = []
    for part in masks.split(subject.batch_size):
        seen = data * part[:, None].to(data.dtype)
        outputs = subject.scores(seen)
        scores.append(subject.chosen(outputs.softmax(1) if weights == "classes" else outputs))
    found = torch.cat(scores)[None].to(activations.dtype)
    return found if weights == "classes" else scorecam_weights(found)


def _enlarged(maps: Tensor, data: Tensor) -> Tensor:
    """Return maps (n, 1, places…) at the size of the input; tokens of a picture become a square first."""
    size = data.shape[2:]
    if maps.dim() == 3 and len(size) == 2:
        maps = _squared(maps)
    if maps.dim() - 2 != len(size) or len(size) not in ENLARGEMENTS:
        raise ConfigurationError(
            f"the layer has {maps.dim() - 2} dimensions of places and the input {len(size)}; name another layer"
        )
    return F.interpolate(maps, size=tuple(size), mode=ENLARGEMENTS[len(size)], align_corners=False)


def _squared(maps: Tensor) -> Tensor:
    """Return the tokens of a picture as a square; class tokens come first and are left out."""
    count = maps.shape[2]
    side = math.isqrt(count)
    if count - side * side > 4:
        raise ConfigurationError(f"{count} tokens are no square and a few class tokens; name another layer")
    return maps[:, :, count - side * side :].reshape(*maps.shape[:2], side, side)


def _unit(maps: Tensor) -> Tensor:
    """Scale each map to 0…1; a flat one becomes zeros."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)
    return ((flat - low) / width).view_as(maps)


def _outcome(subject: Subject, maps: Tensor, layer: str, scaled: bool) -> Outcome:
    if not isinstance(scaled, bool):
        raise ConfigurationError(f"scaled is {scaled!r}; expected True or False")
    data = subject.inputs.tensor
    is_tokens = subject.inputs.kind == "tokens" or (data.dim() == 3 and maps.shape[1:] == data.shape[1:2])
    values = maps if is_tokens else _enlarged(maps[:, None], data)[:, 0]
    return Outcome(
        _unit(values) if scaled else values,
        "tokens" if subject.inputs.kind == "tokens" else "map",
        details={"layer": layer, "places": list(maps.shape[1:])},
    )
