"""The methods by name. A method is a function of a subject; its keyword-only arguments are its options.

@method("saliency", scope="local", needs="gradients", summary="the gradient of the score at the input")
def saliency(subject: Subject, *, absolute: bool = False) -> Outcome: ...
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kaisa.errors import ConfigurationError
from kaisa.explain.subject import Outcome

Function = Callable[..., Outcome]
SCOPES = ("local", "global", "examples")
NEEDS = ("function", "gradients", "layer", "module")


@dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
        name: what users call it.
        function: it takes a subject and options.
        scope: `local` explains inputs, `global` the model, `examples` by training examples.
        needs: a bare `function`; a `module` for its `gradients` by inputs, for a `layer`, or for anything else of it.
        summary: half a sentence.
        kinds: the kinds of inputs that it explains; empty for all.
    """

    name: str
    function: Function
    scope: str
    needs: str
    summary: str
    kinds: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options with their defaults; `inspect.Parameter.empty` where one must be given."""
        parameters = inspect.signature(self.function).parameters.values()
        return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, those that were not given by their defaults.

        Raises:
            ConfigurationError: one is unknown, or one that must be given is missing.
        """
        options = self.options
        for name in given:
            if name not in options:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                known = ", ".join(options) or "none"
                raise ConfigurationError(f"{self.name} has no option {name!r}{hint} Its options: {known}")
        complete = {**options, **given}
        missing = [name for name, value in complete.items() if value is inspect.Parameter.empty]
        if missing:
            raise ConfigurationError(f"{self.name} needs {', '.join(f'{name}=' for name in missing)}")
        return complete


_METHODS: dict[str, Method] = {}


def method(
    name: str, *, scope: str, needs: str, summary: str, kinds: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Register a function of a subject as the method of this name."""
    assert scope in SCOPES, scope
    assert needs in NEEDS, needs
    assert name not in _METHODS, name

    def register(function: Function) -> Function:
        _METHODS[name] = Method(name, function, scope, needs, summary, kinds)
        return function

    return register


def find(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ConfigurationError: there is none; the message lists all.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigurationError(f"there is no method {name!r}; {hint}There are: {', '.join(_METHODS)}")
    return _METHODS[name]


def methods() -> dict[str, Method]:
    """Return all methods by name."""
    return dict(_METHODS)
