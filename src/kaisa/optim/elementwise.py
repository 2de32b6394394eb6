"""Optimizers whose rule treats every element of every parameter alike.

    parameters with a gradient ─► runs of one device and type ─► sign, weight decay ─► the rule ─► Lookahead

A subclass gives the rule and the tensors that it remembers for each parameter. All that a user of `torch.optim`
expects is here: groups with options of their own, missing gradients, `maximize`, closures, any dtype and layout, and
states that travel through files unchanged.

Parameters of 16 bits keep their state, and compute their steps, in 32 bits: with β = 0.999 an average moves by less
than such a number can tell. Complex parameters are pairs of real ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kaisa.errors import ConfigurationError
from kaisa.optim.operations import ONE_BY_ONE, TOGETHER, Operations
from kaisa.schedules import NON_NEGATIVE, STEPS, Range

State = dict[str, Any]
Group = dict[str, Any]

SHARE = Range("a number from 0 to 1", 0.0, 1.0)
CACHED = 1 << 17
"""How many elements are updated at once on a processor, so that what one operation leaves the next finds in cache."""
PLAIN = (Tensor, torch.nn.Parameter)


def check_number(name: str, value: object, allowed: Range) -> None:
    """Raise ConfigurationError unless a value lies in its range."""
    if value not in allowed:
        raise ConfigurationError(f"{name} is {value!r}; give {allowed.words}")


def check_flag(name: str, value: object, *allowed: object) -> None:
    """Raise ConfigurationError unless a value is one of those that there are."""
    if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
        raise ConfigurationError(f"{name} is {value!r}; give {' or '.join(map(repr, allowed))}")


@dataclass
class Run:
    """Tensors that are updated together: of one group, device and type.

    Attributes:
        parameters: what is trained.
        xs: their values, real and of at least 32 bits: the same storage where possible, else a copy.
        gs: their gradients likewise.
        states: what is remembered of each.
    """

    parameters: list[Tensor]
    xs: list[Tensor]
    gs: list[Tensor]
    states: list[State]

    def remembered(self, name: str) -> list[Tensor]:
        """Return one of the remembered tensors of every parameter."""
        return [state[name] for state in self.states]

    @property
    def steps(self) -> list[int]:
        """How many steps each parameter has taken, with this one."""
        return [state["step"] for state in self.states]


class ElementwiseOptimizer(torch.optim.Optimizer, ABC):
    """What RSG and ARSG share: everything but the rule.

    Options of every group: ``lr``, ``weight_decay``, ``decoupled_weight_decay``, ``lookahead_steps``,
    ``lookahead_share``, ``maximize``, ``foreach``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own; those that are not given are the optimizer's.

        Raises:
            ConfigurationError: an option is out of its range; nothing has been added.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            self._check_shared(group)
            self._check(group)
        super().add_param_group(param_group)

    def _check_shared(self, group: Group) -> None:
        check_number("lr", group["lr"], NON_NEGATIVE)
        check_number("weight_decay", group["weight_decay"], NON_NEGATIVE)
        check_number("lookahead_share", group["lookahead_share"], SHARE)
        if group["lookahead_steps"] is not None:
            check_number("lookahead_steps", group["lookahead_steps"], STEPS)
        check_flag("decoupled_weight_decay", group["decoupled_weight_decay"], True, False)
        check_flag("maximize", group["maximize"], True, False)
        check_flag("foreach", group["foreach"], True, False, None)

    @abstractmethod
    def _check(self, group: Group) -> None:
        """Raise ConfigurationError where an option of the rule is out of its range."""

    @abstractmethod
    def _remember(self, x: Tensor, group: Group) -> dict[str, Tensor]:
        """Return what the rule remembers of a parameter before its first step."""

    @abstractmethod
    def _update_(self, run: Run, group: Group, operations: Operations) -> None:
        """Apply the rule to ``run.xs`` and to what is remembered."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that are there; parameters without one stay as they are.

        Args:
            closure: computes the loss and its gradients anew; optional.

        Returns:
            What the closure returned; None without one.

        Raises:
            ConfigurationError: a gradient is sparse; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            operations = TOGETHER if _may_be_listed(group) else ONE_BY_ONE
            for parameters in _runs(group, together=operations is TOGETHER):
                self._advance_(self._collect(parameters, group), group, operations)
        return loss

    def _check_gradients(self) -> None:
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ConfigurationError(
                    f"{type(self).__name__} needs dense gradients, but that of a parameter of shape "
                    f"{tuple(parameter.shape)} is sparse; give the embedding sparse=False, or the parameter "
                    "another optimizer"
                )

    def _collect(self, parameters: list[Tensor], group: Group) -> Run:
        """Return a run of parameters; their states are made if this is their first step."""
        run = Run(parameters, [], [], [])
        for parameter in parameters:
            x, state = _working(parameter), self.state[parameter]
            if not state:
                state["step"] = 0
                state.update(self._remember(x, group))
                if group["lookahead_steps"] is not None:
                    state["slow"] = x.clone()
            state["step"] += 1
            assert parameter.grad is not None
            run.xs.append(x)
            run.gs.append(_working(parameter.grad))
            run.states.append(state)
        return run

    def _advance_(self, run: Run, group: Group, operations: Operations) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if group["maximize"]:
            run.gs = operations.negative(run.gs)
        if decay and group["decoupled_weight_decay"]:
            operations.multiply_(run.xs, 1 - lr * decay)
        elif decay:
            run.gs = operations.add(run.gs, run.xs, decay)
        self._update_(run, group, operations)
        if group["lookahead_steps"] is not None:
            self._look_ahead_(run, group, operations)
        if run.xs[0].dtype is not _real_type(run.parameters[0]):
            operations.copy_([_real(parameter) for parameter in run.parameters], run.xs)

    def _look_ahead_(self, run: Run, group: Group, operations: Operations) -> None:
        """Every so many steps go back to a slow average of the weights (Zhang et al. 2019); momentum stays."""
        due = [i for i, step in enumerate(run.steps) if step % group["lookahead_steps"] == 0]
        if not due:
            return
        xs = [run.xs[i] for i in due]
        slow = [run.states[i]["slow"] for i in due]
        operations.mix_(slow, xs, group["lookahead_share"])
        operations.copy_(xs, slow)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; tensors keep the type they were saved with, where torch would round them to 16 bits."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = torch.promote_types(_real_type(parameter), torch.float32)
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)


def _may_be_listed(group: Group) -> bool:
    """Whether a group is updated in lists: unless forbidden, where all tensors are plain ones."""
    if group["foreach"] is not None:
        return bool(group["foreach"])
    return all(type(parameter) in PLAIN for parameter in group["params"])


def _runs(group: Group, *, together: bool) -> Iterator[list[Tensor]]:
    """Yield the parameters with a gradient in lists of one device and type; on a processor each fits its cache."""
    open_runs: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        key = parameter.device, parameter.dtype
        run, size = open_runs.get(key, []), sizes.get(key, 0) + parameter.numel()
        if run and (not together or (size > CACHED and parameter.device.type == "cpu")):
            yield open_runs.pop(key)
            run, size = [], parameter.numel()
        run.append(parameter)
        open_runs[key], sizes[key] = run, size
    yield from open_runs.values()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _real_type(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _working(tensor: Tensor) -> Tensor:
    """Return a tensor as the rules take it: real, of at least 32 bits."""
    real = _real(tensor)
    return real.float() if real.dtype in (torch.float16, torch.bfloat16) else real
