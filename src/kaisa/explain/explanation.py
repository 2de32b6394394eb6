"""An explanation is a value: what was asked, of which model, what came out, and figures that say how good it is.

It can be drawn (`plot`), kept (`save`: a picture, JSON or a page of its own) and read back (`Explanation.load`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("map", "features", "tokens", "picture", "trace", "examples")
FORMAT = "kaisa explanation 1"


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a method says about a model, with everything that is needed to say it again.

    Attributes:
        method: the name of the method.
        values: what it says; the first dimension counts the explained inputs (or pictures, or training examples).
        kind: how the values are meant: `map` (shaped like the input), `features` and `tokens` (one number for each of
            `names`), `picture` (inputs that were made), `trace` and `examples` (one number for each training example).
        target: the explained output of each input, or None where the method explains none or a function chose it.
        options: all options of the method, those that were not given too.
        seed: everything random came from it.
        digest: a digest of the model's weights; empty for a function.
        quality: figures by name, one for each explained input, or one for all.
        details: what else the method tells: layers, segments, rules, traces.
        inputs: what was explained.
        names: names of the features, or the tokens of each input.
    """

    method: str
    values: Tensor
    kind: str
    target: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    digest: str = ""
    quality: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    inputs: Tensor | tuple[str, ...] | None = None
    names: tuple[str, ...] | tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")

    def __repr__(self) -> str:
        quality = ", ".join(f"{name} {_brief(figures)}" for name, figures in self.quality.items())
        shape = "×".join(str(size) for size in self.values.shape)
        return (
            f"Explanation({self.method}, {self.kind} {shape}, target {self.target}{', ' if quality else ''}{quality})"
        )

    def with_quality(self, figures: Mapping[str, tuple[float, ...]]) -> Explanation:
        """Return this explanation with more figures of quality."""
        return replace(self, quality={**self.quality, **figures})

    def plot(self) -> Figure:
        """Draw the explanation.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        return drawing.figure(self)

    def png(self, dots_per_inch: int = 100) -> bytes:
        """Return the drawing as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=dots_per_inch, bbox_inches="tight", metadata={"Software": ""})
        return buffer.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the explanation to a file; its suffix decides: `.png`, `.json`, or `.html` for a page in one file.

        Raises:
            ConfigurationError: the suffix is none of these.
        """
        path = Path(path)
        writers = {".png": self.png, ".json": self._json, ".html": self._html}
        if path.suffix not in writers:
            raise ConfigurationError(f"{path.name} ends in {path.suffix!r}; expected {', '.join(writers)}")
        content = writers[path.suffix]()
        path.write_bytes(content)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read an explanation that was saved as JSON.

        Raises:
            DataError: the file is not such an explanation.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("format") != FORMAT:
                raise KeyError("format")
            fields = {name: _decoded(value) for name, value in record.items()}
            for name in ("quality",):
                fields[name] = {key: tuple(figures) for key, figures in fields[name].items()}
            return cls(**{**fields, **{name: _tupled(fields[name]) for name in ("target", "names", "inputs")}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not an explanation saved as JSON: {error!r}") from error

    def _json(self) -> bytes:
        record = {name: _encoded(getattr(self, name)) for name in self.__dataclass_fields__}
        return (json.dumps({"format": FORMAT, **record}, indent=1) + "\n").encode()

    def _html(self) -> bytes:
        from kaisa.explain.page import page  # the page draws explanations, so it is above them

        return page([self], title=f"{self.method}").encode()


def _encoded(value: Any) -> Any:
    """Return a value in the words of JSON; tensors become their shape, type and numbers."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu()
        kind = str(numbers.dtype).removeprefix("torch.")
        return {"tensor": kind, "shape": list(numbers.shape), "numbers": numbers.flatten().tolist()}
    if isinstance(value, Mapping):
        return {str(name): _encoded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else repr(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["numbers"], dtype=getattr(torch, value["tensor"])).reshape(value["shape"])
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def _brief(figures: tuple[float, ...]) -> str:
    return ", ".join(f"{figure:.3g}" for figure in figures[:3]) + (", …" if len(figures) > 3 else "")
