"""Drawings of explanations with matplotlib, without a display and without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from kaisa.explain.needs import load
from kaisa.explain.texts import LINE_END

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # inputs of a batch
BARS = 15  # features, training examples
PANEL = 2.6  # inches
WIDTH = 76  # characters of a line of tokens
GAP = 0.8  # between tokens, in characters


class Drawable(Protocol):
    """What is drawn of an explanation."""

    # What each of these is, `Explanation` says.
    @property
    def method(self) -> str: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def kind(self) -> str: ...
    @property
    def target(self) -> tuple[int, ...] | None: ...
    @property
    def quality(self) -> Mapping[str, tuple[float, ...]]: ...
    @property
    def details(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> Tensor | tuple[str, ...] | None: ...
    @property
    def names(self) -> tuple[Any, ...]: ...


def figure(explanation: Drawable) -> Figure:
    """Draw an explanation: a row of panels for each input, with the figures of quality above."""
    draw = {
        "map": _maps,
        "features": _features,
        "tokens": _tokens,
        "picture": _pictures,
        "trace": _traces,
        "examples": _examples,
    }[explanation.kind]
    canvas = draw(explanation)
    canvas.suptitle(_title(explanation), fontsize=9)
    return canvas


def _title(explanation: Drawable) -> str:
    named = explanation.details.get("target_names", explanation.target)
    target = "" if named is None else f", target {', '.join(map(str, named[:SHOWN]))}"
    figures = [f"{name} {figures[0]:.3g}" for name, figures in explanation.quality.items() if len(figures)]
    return f"{explanation.method}{target}" + (f"\n{'   '.join(figures)}" if figures else "")


def _canvas(rows: int, columns: int, width: float = PANEL, height: float = PANEL) -> tuple[Figure, Any]:
    found = load("matplotlib.figure", "a drawing").Figure((columns * width, rows * height + 0.6), layout="constrained")
    return found, found.subplots(rows, columns, squeeze=False)


def _maps(explanation: Drawable) -> Figure:
    values = explanation.values[:SHOWN]
    inputs = explanation.inputs
    if isinstance(inputs, Tensor) and inputs.dim() == 4 and values.dim() >= 3:
        return _overlays(inputs[:SHOWN], values)
    canvas, axes = _canvas(len(values), 1, width=2 * PANEL)
    for axis, value in zip(axes[:, 0], values, strict=True):
        rows = value.reshape(-1, value.shape[-1]).float().numpy()
        _heat(axis, rows)
        axis.set_aspect("auto")
    return canvas


def _overlays(inputs: Tensor, values: Tensor) -> Figure:
    """Draw each image, the values alone and the values over the image."""
    canvas, axes = _canvas(len(values), 3)
    for line, image, value in zip(axes, inputs, values, strict=True):
        heat = (value.sum(0) if value.dim() == 3 else value).float().numpy()
        shown = _colours(image)
        for axis in line:
            axis.set_axis_off()
        line[0].imshow(shown)
        _heat(line[1], heat)
        line[2].imshow(shown.mean(2), cmap="gray", vmin=0, vmax=1)
        _heat(line[2], heat, alpha=0.6)
    return canvas


def _heat(axis: Any, heat: np.ndarray[Any, Any], alpha: float = 1.0) -> None:
    limit = float(np.abs(heat).max()) or 1.0
    signed = bool((heat < 0).any())
    axis.imshow(heat, cmap="RdBu_r" if signed else "inferno", vmin=-limit if signed else 0, vmax=limit, alpha=alpha)


def _colours(image: Tensor) -> np.ndarray[Any, Any]:
    """Return an image of any number of channels and any range as (height, width, 3) in 0…1."""
    picture = image.float()
    picture = picture if picture.shape[0] == 3 else picture.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = picture.min(), picture.max()
    if low < 0 or high > 1:
        picture = (picture - low) / (high - low if high > low else 1.0)
    return picture.permute(1, 2, 0).numpy()


def _bars(axis: Any, names: Sequence[str], values: Sequence[float]) -> None:
    colours = ["tab:red" if value > 0 else "tab:blue" for value in values]
    places = range(len(values))
    axis.barh(places, values, color=colours)
    axis.set_yticks(places, [_plain(name) for name in names], fontsize=8)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.invert_yaxis()


def _features(explanation: Drawable) -> Figure:
    """Draw what speaks for and against the target, the strongest first, or how precise a rule is as it grows."""
    bars = [_rule(explanation, row) or _strongest(explanation, row) for row in range(len(explanation.values[:SHOWN]))]
    canvas, axes = _canvas(len(bars), 1, 2.2 * PANEL, 0.6 + 0.22 * max(map(len, bars)))
    for row, (axis, named) in enumerate(zip(axes[:, 0], bars, strict=True)):
        _bars(axis, [name for name, _ in named], [value for _, value in named])
        if "rule" in _told(explanation, row):
            axis.set(xlim=(0, 1))
            axis.set_xlabel("precision", fontsize=8)
    return canvas


def _rule(explanation: Drawable, row: int) -> list[tuple[str, float]]:
    """Return what a rule says, with its precision up to there; nothing where the method gives none."""
    told = _told(explanation, row)
    if "rule" not in told:
        return []
    precisions = [prefix["precision"] for prefix in told["prefixes"]]
    words = [f"and {part}" if place else part for place, part in enumerate(told["rule"])]
    return list(zip(words, precisions, strict=True)) or [("whatever it is", explanation.quality["precision"][row])]


def _strongest(explanation: Drawable, row: int) -> list[tuple[str, float]]:
    """Return the largest values of an input, and in words what has them: features, or the terms of a model of some."""
    value = explanation.values[row].tolist()
    told = _told(explanation, row)
    names = told.get("bins", explanation.names or [f"x{index}" for index in range(len(value))])
    found = list(zip(map(str, names), value, strict=True))
    if any(len(features) > 1 for features, _ in told.get("terms", ())):
        found = [(" and ".join(str(names[index]) for index in features), weight) for features, weight in told["terms"]]
    return sorted(found, key=lambda pair: -abs(pair[1]))[:BARS]


def _told(explanation: Drawable, row: int) -> Mapping[str, Any]:
    """Return what an explanation by perturbation tells of one input."""
    told = explanation.details.get("inputs", ())
    return told[row] if row < len(told) else {}


def _tokens(explanation: Drawable) -> Figure:
    """Draw tokens as a text that runs on, each on the colour of its value."""
    values = explanation.values[:SHOWN]
    texts = [_flow(_tokens_of(explanation, row, len(value))) for row, value in enumerate(values)]
    lines = max(int(text[-1][2]) + 1 for text in texts)
    canvas, axes = _canvas(len(values), 1, 2.3 * PANEL, 0.1 + 0.27 * lines)
    colours = load("matplotlib", "a drawing").colormaps["RdBu_r"]
    for axis, text, value in zip(axes[:, 0], texts, values, strict=True):
        limit = float(value.abs().max()) or 1.0
        axis.set(xlim=(0, WIDTH), ylim=(lines, 0))
        axis.set_axis_off()
        for (token, place, line), weight in zip(text, value.tolist(), strict=False):
            box = {"facecolor": colours(0.5 + 0.4 * weight / limit), "edgecolor": "none", "pad": 1.5}
            ink = "white" if abs(weight) > 0.7 * limit else "black"
            axis.text(place, line + 0.5, token, fontsize=8, family="monospace", va="center", color=ink, bbox=box)
    return canvas


def _flow(tokens: Sequence[str]) -> list[tuple[str, float, int]]:
    """Return each token with its place, in characters, and its line."""
    placed: list[tuple[str, float, int]] = []
    place, line = 0.0, 0
    for token in tokens:
        shown = str(token).replace("\n", LINE_END)
        if place and place + len(shown) > WIDTH:
            place, line = 0.0, line + 1
        placed.append((_plain(shown), place, line))
        place += len(shown) + GAP
    return placed


def _tokens_of(explanation: Drawable, row: int, count: int) -> Sequence[str]:
    names = explanation.names
    if names and isinstance(names[0], str):
        return [str(name) for name in names]
    if row < len(names):
        return list(names[row])
    inputs = explanation.inputs
    return [str(token) for token in inputs[row].tolist()] if isinstance(inputs, Tensor) else [""] * count


def _pictures(explanation: Drawable) -> Figure:
    """Draw what was made, what it was made of above it, and how the objective went."""
    pictures = explanation.values[:SHOWN]
    trace = explanation.details.get("trace")
    originals = explanation.inputs if isinstance(explanation.inputs, Tensor) else None
    has_originals = originals is not None and originals.shape == explanation.values.shape
    canvas, axes = _canvas(1 + has_originals, len(pictures) + (trace is not None))
    if originals is not None and has_originals:
        _show(axes[0], originals[:SHOWN])
        axes[0][0].set_title("given", fontsize=8, loc="left")
    _show(axes[-1], pictures)
    for axis, caption in zip(axes[-1], _captions(explanation), strict=False):
        axis.set_title(caption, fontsize=8, loc="left")
    if trace is not None:
        for axis in axes[:, -1]:
            axis.set_axis_off()
        axes[-1][-1].set_axis_on()
        axes[-1][-1].plot(np.asarray(trace).T if np.ndim(trace) > 1 else np.asarray(trace), linewidth=1)
        axes[-1][-1].set(xlabel="step")
        axes[-1][-1].set_title("objective", fontsize=8, loc="left")
        axes[-1][-1].tick_params(labelsize=7)
    return canvas


def _captions(explanation: Drawable) -> list[str]:
    channels = explanation.details.get("channels")
    if channels is not None:
        return [f"channel {channel}" for channel in channels]
    if explanation.target is not None:
        return [f"{name}" for name in explanation.details.get("target_names", explanation.target)]
    return ["made"]


def _show(axes: Any, pictures: Tensor) -> None:
    for axis, picture in zip(axes, pictures, strict=False):
        axis.imshow(_colours(picture if picture.dim() == 3 else picture.reshape(1, -1, picture.shape[-1])))
        axis.set_axis_off()


def _traces(explanation: Drawable) -> Figure:
    canvas, axes = _canvas(1, 1, 2 * PANEL)
    axes[0][0].plot(explanation.values.reshape(-1, explanation.values.shape[-1]).T.float().numpy())
    return canvas


def _examples(explanation: Drawable) -> Figure:
    shown = explanation.details.get("proponents_inputs")
    if isinstance(shown, Tensor) and shown.dim() == 5 and isinstance(explanation.inputs, Tensor):
        return _example_images(explanation, shown.shape[1])
    values = explanation.values[:SHOWN]
    values = values if values.dim() == 2 else values[None]
    canvas, axes = _canvas(len(values), 1, 2 * PANEL)
    for axis, value in zip(axes[:, 0], values, strict=True):
        order = value.abs().argsort(descending=True)[:BARS].tolist()
        _bars(axis, [f"example {index}" for index in order], value[order].tolist())
    return canvas


def _example_images(explanation: Drawable, count: int) -> Figure:
    """Draw each image, its strongest proponents beside it, and its strongest opponents below them."""
    assert isinstance(explanation.inputs, Tensor)
    inputs, told = explanation.inputs[:SHOWN], explanation.details
    canvas, axes = _canvas(2 * len(inputs), 1 + count, 0.5 * PANEL, 0.58 * PANEL)
    for axis in axes.flat:
        axis.set_axis_off()
    names = told.get("target_names", explanation.target or [""] * len(inputs))
    for row, image in enumerate(inputs):
        _show(axes[2 * row], image[None])
        axes[2 * row][0].set_title(_plain(f"{names[row]}"), fontsize=7, loc="left")
        for line, (sign, title) in enumerate((("proponents", "for"), ("opponents", "against"))):
            _show(axes[2 * row + line][1:], told[f"{sign}_inputs"][row])
            labels = told.get(f"{sign}_names", told[f"{sign}_targets"])[row]
            for axis, label in zip(axes[2 * row + line][1:], labels, strict=True):
                axis.set_title(_plain(f"{title}: {label}"), fontsize=7, loc="left")
    return canvas


def _plain(text: str) -> str:
    """Return a text that matplotlib does not take for mathematics."""
    return str(text).replace("$", r"\$")
