"""AdaHessian: momentum divided by the root of a second moment of the Hessian (arXiv 2006.00719).

    m ← β₁ m + (1 − β₁) g                          every step
    D = the average of |Hz| over a kernel or row   when the Hessian is due
    v ← β₂ v + (1 − β₂) D²                         when the Hessian is due
    m̂ = m / (1 − β₁ᵗ)      v̂ = v / (1 − β₂ⁿ)       t steps, n updates of v
    x ← x − α [m̂ / ((√v̂)ᵏ + ε) + λ x]

Where the product Hz comes from:

    backward(loss) ─► gradients, with their graph ─► .grad, without
                                └─► Hz, when the next backward pass or the step needs the graph no more
    step() ─► Hz of all micro-batches ─► mean over ranks ─► D of each parameter ─► the rule

No graph ever hangs on ``.grad``, so that none outlives the step. What v knows is the same for all elements that D
averages over, and is kept once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kaisa.errors import ConfigurationError, StateError
from kaisa.optim.averaging import AUTO, Averaging, average, check_averaging
from kaisa.optim.branches import Branches
from kaisa.optim.differences import RandomState, check_precision, displaced, quotients
from kaisa.optim.elementwise import ElementwiseOptimizer, Group, Run, check_flag, check_number
from kaisa.optim.hutchinson import (
    DISTRIBUTIONS,
    accumulate_,
    check_differentiable_twice,
    draw,
    gradients,
    leaves,
    product,
)
from kaisa.optim.operations import Operations, Tensors
from kaisa.optim.ranks import mean_over_ranks_
from kaisa.schedules import DECAY, FRACTION, NON_NEGATIVE, POSITIVE, STEPS, Range

POWER = Range("a number from 0 to 1", 0.0, 1.0)
SURROGATES = ("abs", "signed")
BETWEEN = ("hold", "repeat")
SEEDS = 2**62

Reduce = Callable[[Sequence[Tensor]], None]
Probes = Sequence[Tensor]


def adahessian_(
    xs: Tensors,
    ms: Tensors,
    vs: Tensors,
    steps: Sequence[int],
    updates: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    power: float,
    operations: Operations,
) -> None:
    """Move parameters x by momentum m over the root of v, after so many steps and updates of v."""
    denominators = operations.root(vs)
    operations.multiply_(denominators, [(1 - betas[1] ** count) ** -0.5 for count in updates])
    if power != 1:
        for denominator in denominators:
            denominator.pow_(power)
    operations.shift_(denominators, eps)
    operations.add_quotient_(xs, ms, denominators, [-lr / (1 - betas[0] ** step) for step in steps])


@dataclass
class Graph:
    """Gradients of the last backward pass that can be differentiated again.

    Attributes:
        parameters: those that have a gradient.
        gradients: of each, with its graph.
        scale: what the loss was multiplied by; None where nobody said.
        share: of the loss of the step that theirs is.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    scale: Tensor | None = None
    share: float = 1.0


@dataclass
class Curvature:
    """What is known of Hz since the last step.

    Attributes:
        graph: of the backward pass whose Hz has not been computed yet.
        products: of every parameter, Hz for each sample; one mean of z ∘ Hz for the signed surrogate.
        seed: of the probes of this step, once they have been drawn.
        is_observed: whether a backward pass has been here, even one that left no graph.
    """

    graph: Graph | None = None
    products: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    seed: int | None = None
    is_observed: bool = False


@final
class AdaHessian(ElementwiseOptimizer):
    """Adam with the Hessian's diagonal, or what random probes tell of it, in place of the gradient's square.

    Example:
        >>> optimizer = kaisa.optim.AdaHessian(model.parameters(), lr=0.15)
        >>> optimizer.backward(loss)  # in place of loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    ``loss.backward(create_graph=optimizer.hessian_due)`` does as well, for a single backward pass on one process.

    Args:
        params: parameters, or groups of them with options of their own: lr, betas, eps, weight_decay, hessian_power,
            averaging, maximize and foreach.
        lr: step size α.
        betas: decays (β₁, β₂) of gradient and squared Hessian, from 0 to below 1.
        eps: added to the denominator after the power.
        weight_decay: λ, decoupled: x shrinks by lr · λ a step.
        hessian_power: k from 0, momentum SGD with a step of lr / (1 + ε), to 1, a Newton-like step.
        averaging: "auto" (see `kaisa.optim.averaging`), None, n for runs of n elements, a function from |Hz| to what is
            broadcast to it, or a mapping from numbers of dimensions to these.
        update_period: steps between two updates of v; in between, the step costs no more than that of Adam.
        num_samples: probes a time.
        distribution: of probes: "rademacher" (±1) or "gaussian".
        surrogate: "abs" for the mean of |Hz|; "signed" for that of z ∘ Hz, whose mean is the diagonal.
        between: what v does when the Hessian is not due: "hold", or "repeat" to take in the last D again.
        generator: on the processor, and alike on all ranks; None for one of seed 0.
        reduce: takes the mean of tensors over ranks, in place; None for all ranks of torch.distributed.
        maximize: go up instead of down.
        foreach: update lists of tensors at once; None for wherever the tensors are plain ones.

    Raises:
        ConfigurationError: an option is out of its range, or does not fit the shape of a parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        averaging: Averaging = AUTO,
        update_period: int = 1,
        num_samples: int = 1,
        distribution: str = "rademacher",
        surrogate: str = "abs",
        between: str = "hold",
        generator: torch.Generator | None = None,
        reduce: Reduce | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        check_number("update_period", update_period, STEPS)
        check_number("num_samples", num_samples, STEPS)
        check_flag("distribution", distribution, *DISTRIBUTIONS)
        check_flag("surrogate", surrogate, *SURROGATES)
        check_flag("between", between, *BETWEEN)
        if generator is not None and generator.device.type != "cpu":
            raise ConfigurationError(
                f"generator is on {generator.device}; give one on the processor: it only seeds the probes, which are "
                "drawn where the parameters are"
            )
        self.update_period = update_period
        self.num_samples = num_samples
        self.distribution = distribution
        self.surrogate = surrogate
        self.between = between
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.reduce: Reduce = reduce or mean_over_ranks_
        self._steps = 0
        self._curvature = Curvature()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "averaging": averaging,
            "decoupled_weight_decay": True,
            "lookahead_steps": None,
            "lookahead_share": 0.5,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                check_averaging(group["averaging"], parameter.shape)
        except ConfigurationError:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigurationError(f"betas is {betas!r}; give two numbers, such as (0.9, 0.999)")
        check_number("the first of betas", betas[0], DECAY)
        check_number("the second of betas", betas[1], DECAY)
        check_number("eps", group["eps"], NON_NEGATIVE)
        check_number("hessian_power", group["hessian_power"], POWER)

    @property
    def hessian_due(self) -> bool:
        """Whether the next step updates v, for which its backward passes must leave a graph."""
        return self._steps % self.update_period == 0

    def backward(self, loss: Tensor, *, scaler: torch.amp.GradScaler | None = None, share: float = 1.0) -> None:
        """Compute gradients as ``loss.backward()`` does, and what the step needs to know of the Hessian.

        Call it for every micro-batch; all see the same probe, and only the last graph is kept, until the step.

        Args:
            loss: a number; not scaled, if there is a scaler.
            scaler: multiplies the loss for mixed precision; its scale is taken out of Hz.
            share: of the examples of the step, those that come this way; the rest go through ``loss.backward()`` alone.
                Hz is then that of some of the examples, and costs as little.

        Raises:
            ConfigurationError: the share is not above 0 and at most 1.
            DifferentiationError: an operation in the graph has no second derivative, or allows no second pass.
        """
        check_number("share", share, FRACTION)
        scaled = loss if scaler is None else scaler.scale(loss)
        if not self.hessian_due:
            scaled.backward()
            return
        self._begin()
        inputs, attached = self._pass(scaled, create_graph=True)
        self._curvature.graph = Graph(inputs, attached, _scale(loss, scaler), share)

    def backward_by_difference(
        self,
        closure: Callable[[], Tensor],
        *,
        scaler: torch.amp.GradScaler | None = None,
        probes: Probes | None = None,
        distance: float | None = None,
        share: float = 1.0,
        unsynchronized: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Compute gradients, and Hz as the difference of two: Hz ≈ (g(x + hz) − g(x)) / h.

        Another pass a sample takes the place of second derivatives: about half their time, and hardly any memory.
        Every operation is allowed. In float32 or finer this is Hz, to rounding. Rectifiers, pools of maxima and their
        like are held to the side that they took (see `kaisa.optim.branches`), for otherwise the jumps of their gradient
        would count as curvature, the more so the smaller h. Autocast computes too coarsely for the h that is chosen.
        All passes draw the same random numbers; statistics of batch normalisation see all.

        Args:
            closure: returns the loss, not scaled; called once more for each sample when the Hessian is due.
            scaler: multiplies the loss for mixed precision; its scale is taken out of Hz.
            probes: as `step` takes them; None draws them.
            distance: h · |z| over 1 + |x|; None for twice the root of the precision.
            share: of the examples of the step, those that the closure takes, as for `backward`.
            unsynchronized: makes the context of the further calls: ``model.no_sync`` with DistributedDataParallel.

        Returns:
            The loss.

        Raises:
            ConfigurationError: a parameter has 16 bits, whose differences mean nothing, or the distance is not above 0.
                Nothing has changed.
            StateError: the closure did other operations when it was called again.
        """
        check_number("share", share, FRACTION)
        if not self.hessian_due:
            loss = closure()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss.detach()
        check_precision(self._parameters())
        if distance is not None:
            check_number("distance", distance, POSITIVE)
        self._begin()
        samples = self._draw() if probes is None else self._given(probes)
        state, branches = RandomState(), Branches()
        with branches.observed():
            loss = closure()
        inputs, before = self._pass(loss if scaler is None else scaler.scale(loss), create_graph=False)
        scale = _scale(loss, scaler)
        for number, sample in enumerate(samples):
            z = self._chosen(sample, inputs)
            with displaced(inputs, z, distance) as h, state.again(), unsynchronized():
                with branches.held():
                    again = closure()
                after = torch.autograd.grad(again if scaler is None else scaler.scale(again), inputs)
            self._take(inputs, number, z, quotients(before, after, h * share), scale)
        return loss.detach()

    def _begin(self) -> None:
        """Make ready for another backward pass."""
        self._settle()
        self._forget_cleared()
        self._curvature.is_observed = True

    def _pass(self, loss: Tensor, *, create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Add to all gradients, as a backward pass does; return the parameters that are trained here, and their g."""
        inputs = leaves(loss)
        if not inputs:
            loss.backward()  # which says what is wrong
        if create_graph:
            check_differentiable_twice([loss])
        found = gradients(loss, inputs, create_graph=create_graph)
        accumulate_(inputs, found)
        own = set(self._parameters())
        pairs = [(x, g) for x, g in zip(inputs, found, strict=True) if x in own]
        return [x for x, _ in pairs], [g for _, g in pairs]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them what is known of Hz."""
        super().zero_grad(set_to_none)
        self._curvature = Curvature(seed=self._curvature.seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, probes: Probes | None = None) -> Any:
        """Take one step; parameters without a gradient stay as they are, those that await a Hessian as well.

        Args:
            closure: computes the loss and its gradients anew; optional.
            probes: vectors z to use, one for each parameter that is trained, in the order of the groups; with several
                samples all of the first before those of the second. None draws them.

        Returns:
            What the closure returned; None without one.

        Raises:
            ConfigurationError: the Hessian is due, but no gradient has a graph; or a gradient is sparse, or probes
                do not fit. Nothing has changed.
            DifferentiationError: an operation in the graph has no second derivative.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if self._must_skip():
            self._curvature = Curvature()
            self._detach_gradients()
            return loss
        if self.hessian_due:
            self._observe(probes)
        self._detach_gradients()
        super().step()
        self._curvature = Curvature()
        self._steps += 1
        return loss

    def _parameters(self) -> list[Tensor]:
        every = chain.from_iterable(group["params"] for group in self.param_groups)
        return [parameter for parameter in every if parameter.requires_grad]

    # ------------------------------------------------------------------------------------------------------- scaling

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler should tell its scale: while there is a graph that may hold it."""
        graph = self._curvature.graph
        return graph.scale is None if graph is not None else any(g.requires_grad for g in self._gradients())

    def _must_skip(self) -> bool:
        """Take the scale that a GradScaler told out of the gradients; return whether one of them overflowed."""
        if not hasattr(self, "found_inf"):
            return False
        scale: Tensor | None = self.grad_scale  # type: ignore[attr-defined]
        if self.hessian_due and scale is None:
            raise ConfigurationError(
                "the gradients were unscaled before the step, but Hz still holds the loss scale; compute them with "
                "optimizer.backward(loss, scaler=scaler)"
            )
        if self.found_inf:  # the scaler itself waits for this number
            return True
        if scale is not None:
            torch._foreach_div_(self._gradients(), scale)
        if scale is not None and self.hessian_due:
            self._curvature.graph = self._curvature.graph or self._graph_of_gradients()
            self._curvature.graph.scale = scale
        return False

    # ----------------------------------------------------------------------------------------------------- curvature

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]

    def _detach_gradients(self) -> None:
        """Break the cycle of parameter, gradient and graph that ``backward(create_graph=True)`` leaves."""
        for parameter in self._parameters():
            if parameter.grad is not None and parameter.grad.requires_grad:
                parameter.grad = parameter.grad.detach()

    def _forget_cleared(self) -> None:
        """Forget Hz of gradients that were cleared, which were those of a step that was skipped."""
        for parameter in list(self._curvature.products):
            if parameter.grad is None:
                del self._curvature.products[parameter]

    def _graph_of_gradients(self) -> Graph:
        trained = [parameter for parameter in self._parameters() if parameter.grad is not None]
        return Graph(trained, self._gradients())

    def _observe(self, probes: Probes | None) -> None:
        """Compute what is missing of Hz, and take its mean over ranks."""
        curvature = self._curvature
        if not curvature.is_observed:
            curvature.graph = curvature.graph or self._graph_of_gradients()
            if curvature.graph.parameters and not any(g.requires_grad for g in curvature.graph.gradients):
                raise ConfigurationError(
                    "the Hessian is due, but no gradient has a graph to compute it from; call optimizer.backward(loss) "
                    "in place of loss.backward(), or loss.backward(create_graph=optimizer.hessian_due)"
                )
            check_differentiable_twice(curvature.graph.gradients)
        elif probes is not None and curvature.products:
            raise ConfigurationError(
                "probes are given for a step of several backward passes, of which all but the last have used others; "
                "make a single pass, or let probes be drawn"
            )
        self._settle(probes)
        parameters = self._parameters()
        count = self.num_samples if self.surrogate == "abs" else 1
        for parameter in parameters:  # every rank reduces all, whichever of them it used
            if parameter not in curvature.products:
                curvature.products[parameter] = [torch.zeros_like(parameter) for _ in range(count)]
        self.reduce([part for parameter in parameters for part in curvature.products[parameter]])

    def _settle(self, probes: Probes | None = None) -> None:
        """Compute Hz of the last backward pass, add it to that of those before, and free the graph."""
        graph, self._curvature.graph = self._curvature.graph, None
        if graph is None or not graph.parameters or all(x.grad is None for x in graph.parameters):
            return
        samples = self._draw() if probes is None else self._given(probes)
        for number, sample in enumerate(samples):
            z = self._chosen(sample, graph.parameters)
            products = product(graph.gradients, graph.parameters, z, last=number == len(samples) - 1)
            if graph.share != 1:
                torch._foreach_div_(products, graph.share)
            self._take(graph.parameters, number, z, products, graph.scale)

    def _chosen(self, sample: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the probes of some of the parameters."""
        position = {parameter: index for index, parameter in enumerate(self._parameters())}
        return [sample[position[parameter]].detach() for parameter in parameters]

    def _take(
        self,
        parameters: Sequence[Tensor],
        number: int,
        zs: Sequence[Tensor],
        products: list[Tensor],
        scale: Tensor | None,
    ) -> None:
        """Add Hz of a backward pass, for one of the samples, to that of those before."""
        if scale is not None:
            torch._foreach_div_(products, scale)
        for parameter, z, hz in zip(parameters, zs, products, strict=True):
            self._add(parameter, number, z, hz)

    def _add(self, parameter: Tensor, number: int, z: Tensor, hz: Tensor) -> None:
        held = self._curvature.products.setdefault(parameter, [])
        if self.surrogate == "signed":
            number, hz = 0, _times(z, hz) / self.num_samples
        if number < len(held):
            held[number] = held[number] + hz
        else:
            held.append(hz)

    def _draw(self) -> list[list[Tensor]]:
        if self._curvature.seed is None:
            self._curvature.seed = int(torch.randint(SEEDS, (), generator=self.generator))
        return draw(self._parameters(), self.distribution, self.num_samples, self._curvature.seed)

    def _given(self, probes: Probes) -> list[list[Tensor]]:
        parameters = self._parameters()
        expected = [parameter.shape for parameter in parameters] * self.num_samples
        shapes = [probe.shape for probe in probes]
        if shapes != expected:
            raise ConfigurationError(
                f"probes have the shapes {[tuple(shape) for shape in shapes]}; give one for each parameter and sample, "
                f"of the shapes {[tuple(shape) for shape in expected]}"
            )
        count = len(parameters)
        return [list(probes[start : start + count]) for start in range(0, len(probes), count)]

    # ---------------------------------------------------------------------------------------------------------- rule

    def _remember(self, x: Tensor, group: Group) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(x)}

    def _update_(self, run: Run, group: Group, operations: Operations) -> None:
        betas = group["betas"]
        operations.mix_(run.remembered("exp_avg"), run.gs, 1 - betas[0])
        self._update_curvature_(run, group, operations)
        ready = [index for index, state in enumerate(run.states) if "exp_hessian_diag_sq" in state]
        if not ready:
            return
        states = [run.states[index] for index in ready]
        adahessian_(
            [run.xs[index] for index in ready],
            [state["exp_avg"] for state in states],
            [state["exp_hessian_diag_sq"] for state in states],
            [state["step"] for state in states],
            [state["hessian_updates"] for state in states],
            lr=group["lr"],
            betas=betas,
            eps=group["eps"] or torch.finfo(run.xs[0].dtype).tiny,  # a weight that nothing depends on stays
            power=group["hessian_power"],
            operations=operations,
        )

    def _update_curvature_(self, run: Run, group: Group, operations: Operations) -> None:
        """Take D² into v where there is a D; what is not finite leaves v as it is."""
        states: list[dict[str, Any]] = []
        squares: list[Tensor] = []
        for parameter, x, state in zip(run.parameters, run.xs, run.states, strict=True):
            d = self._diagonal(parameter, x, state, group)
            if d is None:
                continue
            if "exp_hessian_diag_sq" not in state:
                state["exp_hessian_diag_sq"], state["hessian_updates"] = torch.zeros_like(d), 0
            state["hessian_updates"] += 1
            states.append(state)
            square = d * d
            squares.append(torch.where(square < math.inf, square, state["exp_hessian_diag_sq"]))
        if states:
            operations.mix_([state["exp_hessian_diag_sq"] for state in states], squares, 1 - group["betas"][1])

    def _diagonal(self, parameter: Tensor, x: Tensor, state: dict[str, Any], group: Group) -> Tensor | None:
        """Return D of a parameter, averaged; None when v holds."""
        products = self._curvature.products.pop(parameter, None)
        if products is None:
            return state.get("hessian")
        parts = [(torch.view_as_real(hz) if hz.is_complex() else hz).to(x.dtype) for hz in products]
        if self.surrogate == "abs":
            parts = [part.abs() for part in parts]
        d = average(parts[0] if len(parts) == 1 else torch.stack(parts).mean(0), group["averaging"], parameter.shape)
        if self.between == "repeat" and self.update_period > 1:
            state["hessian"] = d
        return d

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped, the generator of probes included.

        How to average is not in it: it may be a function, and comes from the constructor.
        """
        saved = super().state_dict()
        groups = [{key: value for key, value in one.items() if key != "averaging"} for one in saved["param_groups"]]
        own = {"steps": self._steps, "generator": self.generator.get_state()}
        return {**saved, "param_groups": groups, "adahessian": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            StateError: the state is not of this optimizer; nothing has changed.
        """
        own = state_dict.get("adahessian")
        if not isinstance(own, Mapping) or set(own) != {"steps", "generator"}:
            raise StateError("the state has no entry 'adahessian'; give one that AdaHessian.state_dict() returned")
        rules = [group["averaging"] for group in self.param_groups]
        super().load_state_dict({**state_dict})
        for group, rule in zip(self.param_groups, rules, strict=True):
            group["averaging"] = rule
        self._steps = int(own["steps"])
        self.generator.set_state(own["generator"].cpu())
        self._curvature = Curvature()


def _scale(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor | None:
    """Return what a scaler multiplies a loss by, without waiting for the device."""
    return None if scaler is None else scaler.scale(torch.ones_like(loss.detach()))


def _times(z: Tensor, hz: Tensor) -> Tensor:
    """Return z ∘ Hz, of complex numbers part by part."""
    if not z.is_complex():
        return z * hz
    return torch.view_as_complex(torch.view_as_real(z) * torch.view_as_real(hz.resolve_conj()))
