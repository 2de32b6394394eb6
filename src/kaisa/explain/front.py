"""The one verb: explain a model or a function at inputs, by a method."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import anchors, cams, gradients, influence, shapley, surrogates, synthesis  # noqa: F401  each registers its methods
from kaisa.explain.explanation import Explanation
from kaisa.explain.modules import device_of, digest, undisturbed
from kaisa.explain.registry import Method, find, methods
from kaisa.explain.subject import Inputs, Outcome, Report, Subject, read_inputs
from kaisa.explain.targets import Target, TargetLike

Names = Sequence[str] | Sequence[Sequence[str]]


def explain(
    model_or_function: nn.Module | Callable[..., Any],
    inputs: Any,
    method: str = "integrated_gradients",
    target: TargetLike = None,
    *,
    kind: str | None = None,
    names: Names = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | Report | None = None,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Explain what a model gives for inputs.

    The model is left as it was found, also after errors: its mode, its gradients, its hooks, its buffers.

    Args:
        model_or_function: a module, or, for methods that only perturb, any function from a batch to outputs: it is
            called with what the inputs are, a tensor, an array or a list of texts.
        inputs: a tensor or an array, batch first, or texts; None for methods that explain the model alone.
        method: the name of a method; `kaisa.explain.methods()` lists them.
        target: the explained output: None for the largest of each input, an int, one int for each input, a tuple (an
            index into one output), or a function from outputs to one score for each input.
        kind: what inputs are, where type and shape do not say: `images`, `rows`, `texts`, `tokens` or `tensor`.
        names: names of the features, or the tokens of each input; only for showing.
        seed: everything random comes from it; the same seed gives the same explanation.
        batch_size: how many inputs the model sees at once.
        progress: True for a bar, a function of (done, total), False for none; by default a bar on a terminal.
        arguments: further keyword arguments of the model; tensors with one row for each input go with them.
        options: the options of the method.

    Raises:
        ConfigurationError: method, target or an option does not fit; nothing was changed.
        DataError: the inputs cannot be explained.
    """
    chosen = find(method)
    completed = chosen.complete(options)
    _check_call(model_or_function, chosen, seed, batch_size)
    model = model_or_function if isinstance(model_or_function, nn.Module) else None
    read = read_inputs(inputs, kind, None if model is None else device_of(model))
    _check_inputs(read, chosen, is_module=model is not None)
    with undisturbed(model), _chance(seed), _reporting(chosen.name, progress) as report:
        generator = torch.Generator().manual_seed(seed)
        subject = Subject(
            model=model,
            function=model_or_function,
            inputs=read,
            wanted=target,
            seed=seed,
            batch_size=batch_size,
            report=report,
            arguments=dict(arguments or {}),
            names=_names(names, read),
            generator=generator,
        )
        subject = _aimed(subject, chosen)
        outcome = chosen.function(subject, **completed)
    return _explanation(subject, chosen, completed, outcome)


def _check_call(model: Any, method: Method, seed: int, batch_size: int) -> None:
    if not callable(model):
        raise ConfigurationError(f"the model is {type(model).__name__}; expected a torch module or a function")
    if not isinstance(model, nn.Module) and method.needs != "function":
        able = [name for name, other in methods().items() if other.needs == "function"]
        raise ConfigurationError(
            f"{method.name} needs a torch module, and was given a function; methods for functions: {', '.join(able)}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigurationError(f"seed is {seed!r}; expected an int")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size!r}; expected an int of at least 1")


def _check_inputs(inputs: Inputs, method: Method, is_module: bool) -> None:
    if inputs.kind == "none" and method.scope == "local":
        raise DataError(f"{method.name} explains inputs, and there are none")
    if is_module and inputs.kind == "texts":
        raise DataError("a torch module takes tensors, and inputs are texts; give token ids, or a function of texts")
    if method.kinds and inputs.kind not in method.kinds:
        raise DataError(f"{method.name} explains {', '.join(method.kinds)}, and inputs are {inputs.kind}; see kind=")


def _aimed(subject: Subject, method: Method) -> Subject:
    """Return the subject with its target resolved by one look at the outputs."""
    if subject.inputs.data is None or method.scope == "global":
        return subject
    outputs = subject.scores(subject.inputs.data)
    if not bool(torch.isfinite(outputs).all()):
        raise DataError("the model gives outputs that are not finite for these inputs; nothing can be explained")
    return replace(subject, target=Target(subject.wanted, outputs))


def _explanation(subject: Subject, method: Method, options: Mapping[str, Any], outcome: Outcome) -> Explanation:
    data = subject.inputs.data
    target = outcome.target if subject.target is None else outcome.target or subject.target.classes
    return Explanation(
        method=method.name,
        values=outcome.values.detach().cpu(),
        kind=outcome.kind,
        target=target,
        options={name: value for name, value in options.items() if value is not inspect.Parameter.empty},
        seed=subject.seed,
        digest=digest(subject.model),
        quality=dict(outcome.quality),
        details=dict(outcome.details),
        inputs=data.detach().cpu() if isinstance(data, Tensor) else data,
        names=outcome.names or subject.names,
    )


def _names(names: Names, inputs: Inputs) -> tuple[Any, ...]:
    if not isinstance(names, list | tuple):
        raise ConfigurationError(f"names are {type(names).__name__}; expected a list of names")
    features = inputs.tensor.shape[1] if inputs.kind == "rows" else None
    if names and features is not None and len(names) != features:
        raise ConfigurationError(f"there are {len(names)} names for {features} features")
    return tuple(name if isinstance(name, str) else tuple(name) for name in names)


@contextmanager
def _chance(seed: int) -> Iterator[None]:
    """Seed what draws from torch's own generators for a while, and put them back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _reporting(name: str, progress: bool | Report | None) -> Iterator[Report]:
    """Yield what a method calls with how much of how much is done: a bar, the user's function or nothing."""
    if callable(progress):
        yield progress
        return
    shown = sys.stderr.isatty() if progress is None else progress
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bars:
        bar = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
