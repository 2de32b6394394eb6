"""Hooks: one backward pass in, Statistics out.

    forward   note input and output of every layer          (only while capturing; nothing is copied)
    backward  a tensor hook on the output receives its gradient:  δ = terms · gradient / loss scale,
              and the layer's sums are added up at once, so that no activation outlives its own backward

Both factors are made in the backward pass, for two reasons. The input is read through autograd's own saved tensors, so
that activation checkpointing recomputes it, offloading fetches it and in-place changes to it are detected. And a
forward that is recomputed or never differentiated adds nothing, because its hooks never fire. A tensor hook, unlike a
module's full backward hook, leaves in-place activations alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kaisa.kfac.attention import Recorder, attach
from kaisa.kfac.clock import Clock
from kaisa.kfac.factors import Statistics
from kaisa.kfac.layers import Layer, Projection

ExampleObserver = Callable[[Layer, Tensor, Tensor], None]


class Capture:
    """Collects the statistics of all layers of a model while ``active``.

    Args:
        model: the module whose calls tell the batch size.
        layers: what to watch.
        sums_to_mean: "mean" or "sum", how the loss is reduced over its terms.
        terms: returns how many terms the loss has in one backward pass; None for the batch size.
        loss_scale: returns what the loss was multiplied by before the backward pass, beyond the mean.
        fraction: the share of examples that enter the statistics, unbiased.
        dtype: the precision of the statistics, at least float32; None for float32, or float64 for float64 layers.
        seed: decides which examples are drawn.
        clock: measures the phase "statistics".
        examples_observer: is shown every layer's inputs and output gradients.
        layer_observer: is told the name of a layer whenever its sums have grown.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        reduction: str,
        terms: Callable[[], float | None],
        loss_scale: Callable[[torch.device], float | Tensor],
        fraction: float,
        dtype: torch.dtype | None,
        seed: int,
        clock: Clock,
        examples_observer: ExampleObserver | None = None,
        layer_observer: Callable[[str], None] | None = None,
    ) -> None:
        self.active = False
        self.reduction = reduction
        self.terms = terms
        self.loss_scale = loss_scale
        self.fraction = fraction
        self.dtype = dtype
        self.clock = clock
        self.examples_observer = examples_observer
        self.layer_observer = layer_observer
        self.generator = torch.Generator().manual_seed(seed)
        self.batch_size: int | None = None
        self._expects_sampled = False
        self._sampling = False
        self._with_inputs = True
        self._sums: dict[str, Statistics] = {}
        self._last_backward: dict[str, int] = {}
        self._anchors: dict[torch.device, Tensor] = {}
        self._removers: list[Callable[[], None]] = [
            model.register_forward_pre_hook(_Hook(self._note_batch_size), with_kwargs=True).remove
        ]
        for module, its_layers in _by_module(layers).items():
            self._removers.append(self._attach(module, its_layers))

    def _attach(self, module: nn.Module, layers: list[Layer]) -> Callable[[], None]:
        if isinstance(module, nn.MultiheadAttention):
            return self._attach_attention(module, layers)
        return module.register_forward_hook(_Hook(partial(self._forward, layers)), with_kwargs=True).remove

    def _attach_attention(self, module: nn.MultiheadAttention, layers: list[Layer]) -> Callable[[], None]:
        own = tuple(layer for layer in layers if isinstance(layer, Projection))
        return attach(module, Recorder(own, self._record_projection, self._is_wanted))

    def _is_wanted(self) -> bool:
        return self.active and torch.is_grad_enabled()

    def close(self) -> None:
        """Takes every hook off the model."""
        for remove in self._removers:
            remove()
        self._removers.clear()

    def nbytes(self) -> int:
        """Returns the bytes of statistics that wait for the next step."""
        return sum(sums.a.nbytes + sums.g.nbytes for sums in self._sums.values())

    def take(self) -> dict[str, Statistics]:
        """Returns the statistics collected since the last call, by layer name, and forgets them."""
        sums, self._sums, self._last_backward = self._sums, {}, {}
        return sums

    def take_some(self, names: Sequence[str]) -> dict[str, Statistics]:
        """Returns the statistics of some layers and forgets them; what comes later belongs to the next step."""
        return {name: self._sums.pop(name) for name in names if name in self._sums}

    @contextmanager
    def sampling(self, *, with_inputs: bool) -> Iterator[None]:
        """Makes the backward pass inside count, as a gradient of the summed loss; A only when ``with_inputs``."""
        self._sampling, self._with_inputs = True, with_inputs
        try:
            yield
        finally:
            self._sampling, self._with_inputs = False, True

    def expect_sampled(self) -> None:
        """Makes only backward passes inside ``sampling`` count."""
        self._expects_sampled = True

    def _note_batch_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_wanted():  # and not of an evaluation in between, which may be of another size
            self.batch_size = _batch_size((args, kwargs))

    def _forward(
        self, layers: list[Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._is_wanted():
            x = args[0] if args else next(iter(kwargs.values()))
            for layer in layers:
                self._record(layer, module, x, output)

    def _record_projection(self, layer: Layer, module: nn.Module, x: Tensor, output: Tensor, columns: slice) -> None:
        def batch_first(gradient: Tensor) -> Tensor:
            return gradient[..., columns].transpose(0, 1)

        self._record(layer, module, x, output, lambda saved: saved.transpose(0, 1), batch_first)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(
        self,
        layer: Layer,
        module: nn.Module,
        x: Tensor,
        output: Tensor,
        arrange_input: Callable[[Tensor], Tensor] | None = None,
        arrange_gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not output.requires_grad:
            return
        held = [_Saved.apply(x.detach(), self._anchor(output.device))]  # type: ignore[no-untyped-call]
        batch_size = self.batch_size

        def hook(gradient: Tensor) -> None:
            if self._sampling == self._expects_sampled:
                (inputs,) = held[0].grad_fn.saved_tensors
                if not _graph_is_kept():
                    held.clear()  # what autograd frees as it goes, the hook must not keep until the end
                with torch.no_grad(), _exactly(gradient.device), self._timed():
                    self._accumulate(
                        layer,
                        module,
                        arrange_input(inputs) if arrange_input else inputs,
                        arrange_gradient(gradient) if arrange_gradient else gradient,
                        batch_size,
                    )

        output.register_hook(hook)

    def _timed(self) -> AbstractContextManager[None]:
        return self.clock("statistics", counts=not self._sums)

    def _anchor(self, device: torch.device) -> Tensor:
        if device not in self._anchors:
            self._anchors[device] = torch.empty(0, device=device, requires_grad=True)
        return self._anchors[device]

    def _accumulate(self, layer: Layer, module: nn.Module, x: Tensor, gradient: Tensor, batch_size: int | None) -> None:
        if x.numel() == 0:
            return
        terms = self.terms() or batch_size or (x.shape[0] if x.ndim > 1 else 1)
        examples, blocks = self._drawn(x)
        dtype = layer.summed_in(self.dtype)
        x, delta = x.to(dtype) if x.is_floating_point() else x, gradient.to(dtype)
        scale = 1.0 if self._sampling else (terms if self.reduction == "mean" else 1.0)
        unscaled = scale if self._sampling else scale * self.loss_scale(gradient.device)
        if self.examples_observer is not None:
            self.examples_observer(layer, x, delta * unscaled)
        statistics = layer.statistics_of_some(module, x, delta, examples)
        of_gradients = layer.quadratic_in_delta(module)
        # The sums are scaled, not δ, which is as large as an activation.
        for side in of_gradients:
            setattr(statistics, side, getattr(statistics, side).mul_(unscaled * unscaled))
        if blocks != 1:
            statistics.a *= blocks
            statistics.g *= blocks
            statistics.positions *= x.shape[0] / (examples.stop - examples.start)
        if not self._with_inputs:
            for side in {"a", "g"} - set(of_gradients):
                getattr(statistics, side).zero_()
            statistics.positions = 0.0
        statistics.examples, statistics.scale = self._new_terms(layer, terms), scale
        if layer.name in self._sums:
            self._sums[layer.name].add_(statistics)
        else:
            self._sums[layer.name] = statistics
        if self.layer_observer is not None:
            self.layer_observer(layer.name)

    def _new_terms(self, layer: Layer, terms: float) -> float:
        """Counts the terms of a loss once a backward pass, however often the layer was used in it."""
        if not self._with_inputs:
            return 0.0
        backward = torch._C._current_graph_task_id()
        is_new = backward < 0 or self._last_backward.get(layer.name) != backward
        self._last_backward[layer.name] = backward
        return float(terms) if is_new else 0.0

    def _drawn(self, x: Tensor) -> tuple[slice, int]:
        """Returns one of several equally likely blocks of consecutive examples, and how many there are."""
        blocks = round(1 / self.fraction)
        if blocks == 1 or x.ndim < 2 or x.shape[0] < blocks:
            return slice(None), 1
        index = self._block(blocks)
        return slice(x.shape[0] * index // blocks, x.shape[0] * (index + 1) // blocks), blocks

    def _block(self, blocks: int) -> int:
        return int(torch.randint(blocks, (), generator=self.generator))


def _by_module(layers: Sequence[Layer]) -> Mapping[nn.Module, list[Layer]]:
    result: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        for module in layer.modules:
            result.setdefault(module, []).append(layer)
    return result


def _batch_size(value: Any) -> int | None:
    """Returns the length of the first tensor found; a list of tensors (images of different sizes) counts itself."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim > 1 else None
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return len(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((size for size in map(_batch_size, value) if size is not None), None)
    return None


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Turns off what trades precision for speed: border corrections subtract nearly equal numbers."""
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.backends.cudnn.allow_tf32 = tf32


def _graph_is_kept() -> bool:
    """Says whether the running backward pass may be followed by another through the same graph."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _Saved(torch.autograd.Function):
    """Keeps a tensor the way autograd keeps its own: seen by checkpointing, offloading and version checks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Hook:
    """A hook that copies and pickles as one that does nothing: a copy of the model is not ours to watch."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> str:
        return "_nothing"


def _nothing(*args: Any) -> None:
    return None
