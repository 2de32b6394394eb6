"""What is quantised, and to how many bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.quantize.rounding import Branches, Rounding
from kaisa.schedules import Range

EXACT, QAT, FQT = "exact", "qat", "fqt"
MODES = (EXACT, QAT, FQT)
QUANTIZERS = ("ptq", "psq", "bhq")
WEIGHT_GRADIENT_QUANTIZERS = ("ptq", "column")
BATCH, RUNNING = "batch", "running"
SIMULATE, INT8, AUTO = "simulate", "int8", "auto"
EXECUTIONS = (SIMULATE, INT8, AUTO)
BITS = Range("a whole number from 2 to 8, or None for as many as there are", 2, 8, whole=True)
BIAS_BITS = Range("a whole number from 2 to 16, or None for as many as there are", 2, 16, whole=True)
MOMENTUM = Range("a number above 0 and at most 1", 0.0, 1.0, excludes_lowest=True)

Skip = Collection[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class QuantConfig:
    """How a model is trained in few bits (Chen et al. 2020, arXiv 2010.14298).

    Attributes:
        mode: "exact" computes as the float model does; "qat" quantises activations, weights and biases; "fqt" also the
            gradients of the layers' outputs, at random and without bias.
        activation_bits: of a layer's input, 2 to 8; None leaves it as it is, as with all bits.
        weight_bits: of its weight.
        bias_bits: of the bias of linear layers, 2 to 16; biases of convolutions stay as they are.
        gradient_bits: of the output gradient that becomes the gradient of the input; by layer where a mapping of names
            of modules, such as `allocate_bits` returns, and then as they are of layers that it leaves out.
        weight_gradient_bits: of the output gradient that becomes the gradients of weight and bias.
        quantizer: of the former: "ptq", one range for all; "psq", one for each example; "bhq", one for each row after a
            reflection in blocks of examples, which spreads those that are large.
        weight_gradient_quantizer: of the latter: "ptq", or "column", one range for each number of an example; None for
            what suits the quantizer, "ptq" beside "ptq" and "column" beside the others. Where both are "ptq" of as many
            bits, the gradient is quantised once for both uses.
        ranges: of activations in evaluation: "running" averages those of training, "batch" takes each batch's own, with
            which the prediction for an example depends on the others of its batch.
        momentum: weight of a new batch in the running ranges.
        execution: "simulate" computes in floating point with quantised numbers; "int8" the products of linear layers
            and of convolutions with kernels of 1 in integers; "auto" these where the device is fast at it.
        skip_layers: patterns of names of layers or their types to leave out, each of which must fit one; or a function
            of name and module.

    Raises:
        ConfigurationError: an option is out of its range.
    """

    mode: str = FQT
    activation_bits: int | None = 8
    weight_bits: int | None = 8
    bias_bits: int | None = 16
    gradient_bits: int | Mapping[str, int] | None = 8
    weight_gradient_bits: int | None = 8
    quantizer: str = "bhq"
    weight_gradient_quantizer: str | None = None
    ranges: str = RUNNING
    momentum: float = 0.1
    execution: str = SIMULATE
    skip_layers: Skip = field(default=())

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("quantizer", self.quantizer, QUANTIZERS)
        if self.weight_gradient_quantizer is not None:
            check_choice("weight_gradient_quantizer", self.weight_gradient_quantizer, WEIGHT_GRADIENT_QUANTIZERS)
        check_choice("ranges", self.ranges, (BATCH, RUNNING))
        check_choice("execution", self.execution, EXECUTIONS)
        if self.momentum not in MOMENTUM:
            raise ConfigurationError(f"momentum is {self.momentum!r}; give {MOMENTUM.words}")
        self._check_bits()
        if self.execution == INT8 and None in (self.activation_bits, self.weight_bits):
            raise ConfigurationError(
                "execution is 'int8', but activation_bits or weight_bits is None, so that nothing can be in integers; "
                "give both, or choose 'auto' or 'simulate'"
            )
        if not callable(self.skip_layers):
            self._check_patterns()

    def _check_bits(self) -> None:
        for name in ("activation_bits", "weight_bits", "weight_gradient_bits"):
            _check_bits(name, getattr(self, name))
        _check_bits("bias_bits", self.bias_bits, BIAS_BITS)
        if isinstance(self.gradient_bits, Mapping):
            for layer, bits in self.gradient_bits.items():
                _check_bits(f"gradient_bits of {layer}", bits)
        else:
            _check_bits("gradient_bits", self.gradient_bits)

    def _check_patterns(self) -> None:
        if isinstance(self.skip_layers, str) or not isinstance(self.skip_layers, Collection):
            what = "the text " if isinstance(self.skip_layers, str) else ""
            raise ConfigurationError(
                f"skip_layers is {what}{self.skip_layers!r}; give a list of patterns or a function"
            )
        for pattern in self.skip_layers:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigurationError(f"skip_layers has {pattern!r}, which is no pattern: {error}") from error

    @classmethod
    def read(cls, text: str) -> QuantConfig:
        """Return the options that a short text stands for.

        "bhq:5" (likewise "ptq" and "psq") is training in few bits with 5 for the gradients that go on to the input, and
        8 for all else; "qat:8" quantises activations and weights, to 8 bits, and no gradients. Of no bits 8 are taken.

        Raises:
            ConfigurationError: the text stands for nothing.
        """
        kind, colon, number = text.partition(":")
        bits = 8 if not colon else int(number) if number.isdecimal() else None
        if kind not in (QAT, *QUANTIZERS) or bits not in BITS:
            raise ConfigurationError(
                f"quantize is {text!r}; give qat:BITS or one of {', '.join(f'{name}:BITS' for name in QUANTIZERS)}, "
                "with 2 to 8 bits, such as bhq:5"
            )
        if kind == QAT:
            return cls(mode=QAT, activation_bits=bits, weight_bits=bits)
        return cls(quantizer=kind, gradient_bits=bits)

    def skips(self, name: str, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Say whether a module, whose type as a float module is ``kind``, is left out."""
        if callable(self.skip_layers):
            return bool(self.skip_layers(name, module))
        return any(_matches(pattern, name, kind) for pattern in self.skip_layers)

    def idle_patterns(self, layers: Iterable[tuple[str, type[nn.Module]]]) -> list[str]:
        """Return the patterns of ``skip_layers`` that leave out none of the layers, given by name and float type."""
        known, patterns = list(layers), () if callable(self.skip_layers) else self.skip_layers
        return [pattern for pattern in patterns if not any(_matches(pattern, *layer) for layer in known)]

    def branches(self, name: str) -> Branches:
        """Return how the output gradient of a layer is quantised for its two uses."""
        bits = self.gradient_bits
        if isinstance(bits, Mapping):
            bits = bits.get(name)
        suits = "ptq" if self.quantizer == "ptq" else "column"
        return Branches(
            _rounding(self.quantizer, bits),
            _rounding(self.weight_gradient_quantizer or suits, self.weight_gradient_bits),
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ConfigurationError: it is none.
    """
    if value not in choices:
        raise ConfigurationError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def is_number_of_bits(value: object, allowed: Range = BITS) -> bool:
    """Say whether a value is an int within a range: 5.0 would be refused where bits are counted."""
    return isinstance(value, int) and value in allowed


def _check_bits(name: str, value: object, allowed: Range = BITS) -> None:
    if value is not None and not is_number_of_bits(value, allowed):
        raise ConfigurationError(f"{name} is {value!r}; give {allowed.words}")


def _matches(pattern: str, name: str, kind: type[nn.Module]) -> bool:
    return any(re.search(pattern, text) for text in (name, kind.__name__))


def _rounding(kind: str, bits: int | None) -> Rounding | None:
    return None if bits is None else Rounding(kind, bits)
