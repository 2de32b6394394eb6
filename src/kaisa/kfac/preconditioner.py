"""KFACPreconditioner: the step, in phases.

    Statistics ─► running average                              (factor steps)
    factors ─► decompose                                       (inverse steps)
    solve(raw) ─► scale by the trust region ─► .grad           (every step)

Layers whose factors have equal shapes are one stack: decomposed, rotated and scaled as one batch.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, StateError
from kaisa.kfac import fisher as fishers
from kaisa.kfac import options, shards, solvers
from kaisa.kfac import state as states
from kaisa.kfac.agenda import Agenda
from kaisa.kfac.arrangement import (
    AUTO,
    PARTS,
    Arrangement,
    Arranger,
    Measured,
    choose_again,
    is_off,
    profile_of,
    ratios,
    settings_of,
)
from kaisa.kfac.capture import Capture
from kaisa.kfac.clock import Clock
from kaisa.kfac.collectives import Alone, Collectives, Processes, world
from kaisa.kfac.coverage import Coverage, discover, unwrapped
from kaisa.kfac.damping import LevenbergMarquardt, QuadraticModel
from kaisa.kfac.decompositions import Decompositions, Stack
from kaisa.kfac.deferral import Deferral
from kaisa.kfac.example_moments import ExampleMoments
from kaisa.kfac.factors import Factors, Label, Pair, Statistics
from kaisa.kfac.fisher import Fisher
from kaisa.kfac.hardware import Hardware
from kaisa.kfac.layers import EXPAND, REDUCE, Convolution, Layer, LayerOptions, MatrixLayer
from kaisa.kfac.loss_scale import LossScale, LossScaler
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import Placement, nodes_of
from kaisa.kfac.planner import parse_bytes
from kaisa.kfac.rates import Rates
from kaisa.kfac.reduction import Counts
from kaisa.kfac.report import PlanReport
from kaisa.kfac.routes import A, G
from kaisa.kfac.solvers import EKFAC, Solver
from kaisa.kfac.transport import Transport, groups_of
from kaisa.kfac.trust_region import KLClip, TrustRegion
from kaisa.schedules import DECAY, NON_NEGATIVE, POSITIVE, STEPS, Scalar, Schedule

Solved = tuple[list[list[str]], list[Tensor], list[Tensor]]
"""The names of the layers of each stack, their raw gradients, and the preconditioned ones."""


class KFACPreconditioner:
    """Rewrites the gradients of a model with K-FAC before any optimizer's step.

    Example:
        >>> kfac = kaisa.KFACPreconditioner(model, optimizer)
        >>> loss.backward()
        >>> kfac.step()
        >>> optimizer.step()

    Every number may be a function of the step. Names are those of kfac-pytorch.

    Args:
        model: the model, as it is or wrapped by DistributedDataParallel or torch.compile.
        optimizer: the base optimizer, from which the trust region reads the learning rates.
        factor_update_steps: steps between two updates of the factors.
        inv_update_steps: steps between two decompositions.
        damping: λ, in units of the Fisher of the loss per example; a ``LevenbergMarquardt`` adapts it.
        factor_decay: decay of the running average of the factors, 0 to below 1.
        kl_clip: κ of the trust region, None for no trust region; see ``trust_region``.
        lr: learning rate for the trust region where no optimizer is given.
        accumulation_steps: backward passes between two steps; a mean loss is divided by it, a sum is not.
        grad_scaler: the ``GradScaler`` of mixed-precision training (unscale the gradients before ``step()``), or a
            function that returns the loss scale.
        factor_dtype: the type of the factors, None for float32 (float64 for float64 parameters).
        inv_dtype: the type of decompositions and of the products with them.
        skip_layers: regular expressions of module names or type names that are left to the optimizer.
        solver: "eigen", "cholesky", "ekfac", "sqrt_ekfac", "warm_eigen" or a ``Solver``.
        sharing: "expand" or "reduce", the treatment of weights shared over positions (arXiv 2311.00636).
        fisher: "empirical", or "categorical", "gaussian", "bernoulli" for labels sampled from the prediction, or a
            ``Fisher``; all but the empirical need ``sample_fisher(outputs)`` before the backward pass.
        factor_examples: the share of examples that enter the factors, unbiased; one part of 1/share parts is drawn.
        factor_scaling: "fisher", or "kaisa" for the scale and the identity start of the reference implementation.
        loss_reduction: "mean" or "sum" over the terms of the loss.
        loss_terms: how many terms the loss of one backward pass has, when not one for each example: for a language
            model batch × tokens.
        trust_region: replaces the KL clip: a ``FisherNorm``, ``NormConstraint`` or ``Graft``.
        layer_options: which kinds of layer are covered, and the largest dense factor.
        spread_inverses: spreads decompositions over the steps until the next, so that no step is long.
        patience: failed decompositions of a layer in a row that are borne before an error.
        seed: for everything random.
        grad_worker_fraction: the share of ranks that hold a layer's decompositions: "comm" (all), "hybrid" (half),
            "mem" (one), a number, or "auto" for the fastest that the planner predicts.
        colocate_factors: keeps A and G of a layer on one rank.
        local_below: factors with a side below this are decomposed by every gradient worker instead of sent; "auto"
            where that is modelled to take less time (``kaisa.kfac.placement.LocalRule``).
        ranks_per_node: how many consecutive ranks share a machine; None for what ``torchrun`` says, or all.
        memory_budget: bytes a rank that K-FAC may take at its peak, such as "2GiB", with "auto"; None for no limit.
        hardware: a profile of the machine for the planner: a name, a file of ``kaisa plan --calibrate``, or None for a
            known GPU, or two cores.
        replan_beyond: chooses the placement anew when the run shows that computing, decomposing or exchanging takes
            longer or shorter than predicted by more than this factor; None for never.
        payload: how numbers travel, or a mapping of its fields.
        collectives: how to reach the other ranks; None for the running process group.

    Raises:
        ConfigurationError: an option has a value that cannot work, or no layer can be preconditioned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        factor_update_steps: Scalar = 10,
        inv_update_steps: Scalar = 100,
        damping: Scalar = 0.003,
        factor_decay: Scalar = 0.95,
        kl_clip: Scalar | None = 0.001,
        lr: Scalar | None = None,
        accumulation_steps: int = 1,
        grad_scaler: LossScaler | Callable[[], float] | None = None,
        factor_dtype: torch.dtype | None = None,
        inv_dtype: torch.dtype = torch.float32,
        skip_layers: str | Sequence[str] | None = (),
        solver: str | Solver = "eigen",
        sharing: str = EXPAND,
        fisher: str | Fisher = "empirical",
        factor_examples: float = 1.0,
        factor_scaling: str = "fisher",
        loss_reduction: str = "mean",
        loss_terms: Scalar | None = None,
        trust_region: TrustRegion | None = None,
        layer_options: LayerOptions | None = None,
        spread_inverses: bool = False,
        patience: int = 3,
        seed: int = 0,
        grad_worker_fraction: str | float = "comm",
        colocate_factors: bool = False,
        local_below: int | str = "auto",
        ranks_per_node: int | None = None,
        memory_budget: str | int | None = None,
        hardware: str | Path | Hardware | None = None,
        replan_beyond: float | None = None,
        payload: Payload | Mapping[str, Any] | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        if collectives is None:
            collectives = Processes.of_world() if world()[1] > 1 else Alone()
        options.one_of("sharing", sharing, (EXPAND, REDUCE))
        options.one_of("factor_scaling", factor_scaling, ("fisher", "kaisa"))
        options.one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        options.at_least_one("accumulation_steps", accumulation_steps)
        options.at_least_one("patience", patience)
        options.unit_fraction("factor_examples", factor_examples)
        options.floating("inv_dtype", inv_dtype)
        options.floating("factor_dtype", factor_dtype or inv_dtype)
        options.for_the_planner(grad_worker_fraction, memory_budget=memory_budget, replan_beyond=replan_beyond)
        if trust_region is None and kl_clip is not None:
            trust_region = KLClip(kl_clip)
            Schedule("kl_clip", kl_clip, POSITIVE)
        if isinstance(trust_region, KLClip) and optimizer is None and lr is None:
            raise ConfigurationError("the KL clip needs learning rates; give the optimizer, or lr, or kl_clip=None")
        self._factor_interval = Schedule("factor_update_steps", factor_update_steps, STEPS)
        self._inverse_interval = Schedule("inv_update_steps", inv_update_steps, STEPS)
        self._damping = Schedule("damping", damping, POSITIVE)
        self._decay = Schedule("factor_decay", factor_decay, DECAY)
        self._rates = Rates(None if lr is None else Schedule("lr", lr, NON_NEGATIVE), optimizer)
        self._loss_terms = None if loss_terms is None else Schedule("loss_terms", loss_terms, POSITIVE)
        self._solver = solvers.named(solver)
        self._fisher = fishers.named(fisher)
        self._trust_region = trust_region
        self._spread = spread_inverses
        self._patience = patience
        self._factor_dtype = factor_dtype
        self._loss_scale = LossScale(grad_scaler, accumulation_steps if loss_reduction == "mean" else 1, optimizer)
        self._scaling = factor_scaling
        plain = unwrapped(model)
        norm_sharing = REDUCE if loss_terms is None else sharing
        layers, self._coverage = discover(
            plain, layer_options or LayerOptions(), options.patterns("skip_layers", skip_layers), sharing, norm_sharing
        )
        if not layers:
            raise ConfigurationError(f"no layer can be preconditioned:\n{self._coverage}")
        self._layers = {layer.name: layer for layer in layers}
        self.factors = Factors(Label("running", self._fisher.kind, sharing), from_identity=factor_scaling == "kaisa")
        self._decompositions = Decompositions(
            self._solver, list(self._layers), {layer.name: _held_in(layer, inv_dtype) for layer in layers}, patience
        )
        if isinstance(damping, LevenbergMarquardt) and collectives.world_size > 1:
            raise ConfigurationError(
                "LevenbergMarquardt needs all factors on one process; give damping as a number or a function"
            )
        self._inverse_dtype = inv_dtype
        self._payload = Payload(**payload) if isinstance(payload, Mapping) else payload or Payload()
        self._replan_beyond = options.factor_above_one("replan_beyond", replan_beyond)
        shapes = tuple(layer.layer_shape() for layer in layers)
        self._arranger = Arranger(
            shapes=shapes,
            world_size=collectives.world_size,
            fraction=grad_worker_fraction,
            colocate=colocate_factors,
            local_below=options.size_or_auto("local_below", local_below),
            ranks_per_node=nodes_of(ranks_per_node or collectives.ranks_per_node, collectives.world_size),
            deferred=self._payload.deferred,
            settings=settings_of(
                self._solver,
                self._payload,
                factor_update_steps=self._factor_interval.resolve_steps(0),
                inv_update_steps=self._inverse_interval.resolve_steps(0),
                factor_bytes=(factor_dtype or layers[0].summed_in(None)).itemsize,
                decomposition_bytes=_held_in(layers[0], inv_dtype).itemsize,
                colocate=colocate_factors,
                local_below=local_below,
                spread=spread_inverses,
                accumulation_steps=accumulation_steps,
                factor_examples=factor_examples,
            ),
            exchanges=self._exchanges_of_statistics(),
            may_wait=self._statistics_may_wait(),
            holds_all=self._is_per_example,
            parameters=sum(parameter.numel() for parameter in plain.parameters()),
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            hardware=profile_of(hardware, layers[0].weight.device),
        )
        self._arrangement = self._arranger.first()
        self._moves: list[str] = []
        self._transport = self._connected(collectives)
        self._ready: set[str] = set()
        self._deferral = Deferral()
        self._is_deferred = False
        self._terms_seen: float | Tensor | None = None
        self._calls: Counter[str] = Counter()
        self._calls_before: Counter[str] | None = None
        # Ranks that differ would make different groups, so that none is made before they have agreed.
        self._transport.agree(
            {
                "layers": repr(shapes),
                "parameters": "" if self._transport.is_alone else _digest(plain),
                "solver": repr(self._solver),
                "fisher": repr(self._fisher),
                "factor_examples": repr(factor_examples),
                "trust_region": f"{type(trust_region).__name__} {_told(getattr(trust_region, 'limit', None))}",
                "factor_scaling": factor_scaling,
                "loss_reduction": loss_reduction,
                "accumulation_steps": str(accumulation_steps),
                "spread_inverses": str(spread_inverses),
                "patience": str(patience),
                "dtypes": repr((factor_dtype, inv_dtype)),
                "payload": repr(self._payload),
                "placement": repr(
                    (self.placement.workers, colocate_factors, local_below, self.placement.ranks_per_node)
                ),
                "plan": repr(self.placement) if grad_worker_fraction == AUTO else "",
                "deferred": str(self._defers),
                "replan_beyond": str(self._replan_beyond),
                "seed": str(seed),
                **{
                    schedule.name: _told(schedule.value)
                    for schedule in (self._factor_interval, self._inverse_interval, self._damping, self._decay)
                },
            }
        )
        collectives.prepare(groups_of(self.placement))
        self._model = plain
        self._agenda = Agenda(
            self._factor_interval,
            self._inverse_interval,
            sorted(self._layers, key=self._cost, reverse=True),
            spread=spread_inverses,
        )
        self._start: QuadraticModel | None = None
        self._clock = Clock()
        self._example_moments = ExampleMoments(self._decompositions)
        self._label_generator = torch.Generator().manual_seed(seed + collectives.rank)
        per_example = self._is_per_example
        if per_example and self.placement.workers < collectives.world_size:
            raise ConfigurationError(
                "per-example EKFAC needs every rank to hold every decomposition; set grad_worker_fraction='comm'"
            )
        if per_example and factor_examples != 1:
            raise ConfigurationError("per-example EKFAC needs every example; leave factor_examples at 1")
        self._capture = Capture(
            plain,
            layers,
            reduction=loss_reduction,
            terms=self._terms,
            loss_scale=self._loss_scale.undo,
            fraction=factor_examples,
            dtype=factor_dtype,
            seed=seed + collectives.rank,
            clock=self._clock,
            examples_observer=self._example_moments.observe if per_example else None,
            layer_observer=None if self._transport.is_alone else self._note_call,
        )
        if self._fisher.kind != "empirical":
            self._capture.expect_sampled()
        self._capture.active = self._agenda.factors_are_due

    # ------------------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self) -> None:
        """Replaces the gradients of the covered layers by preconditioned ones.

        Call it after the backward pass (with a ``GradScaler``, after ``unscale_``) and before ``optimizer.step()``.

        Raises:
            DecompositionError: a layer could not be decomposed ``patience`` times in a row.
            ConfigurationError: a sampled Fisher was never sampled for.
        """
        self._loss_scale.check_unscaled()
        if self._agenda.factors_are_due:
            with self._clock("factors"):
                self._update_factors()
        elif self._is_deferred and self._agenda.inverses_are_due:
            self.reduce_statistics()
        self._update_inverses()
        with self._clock("precondition"):
            self._precondition()
        self._agenda.step += 1
        self._loss_scale.forget()
        self._capture.batch_size = None
        self._capture.active = self._agenda.factors_are_due

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return self._agenda.step

    @property
    def damping(self) -> float:
        """λ at the coming step."""
        return self._damping.resolve(self.steps)

    @property
    def collectives(self) -> Collectives:
        """How the other ranks are reached, and what was sent."""
        return self._transport.collectives

    @property
    def device(self) -> torch.device:
        """Where decompositions are held, and what travels is."""
        return self._transport.like.device

    def _statistics_may_wait(self) -> bool:
        """Says whether nothing needs statistics on every factor step.

        Raises:
            ConfigurationError: something does, and waiting is asked for.
        """
        needs = ["spread_inverses"] * self._spread + ["per-example EKFAC"] * self._is_per_example
        if self._payload.deferred and needs:
            raise ConfigurationError(f"{needs[0]} needs statistics on every factor step; set Payload(deferred=False)")
        return not needs

    def _exchanges_of_statistics(self) -> float:
        """Returns how often statistics travel for each decomposition, infinite where intervals may change."""
        inverse, factor = self._inverse_interval.value, self._factor_interval.value
        if callable(inverse) or callable(factor):
            return float("inf")
        return max(1.0, float(inverse) / float(factor))

    def _connected(self, collectives: Collectives) -> Transport:
        layers = self._layers.values()
        return Transport(
            collectives,
            self.placement,
            self._arranger.shapes,
            self._solver,
            self._payload,
            {layer.name: layer.summed_in(self._factor_dtype) for layer in layers},
            {layer.name: _held_in(layer, self._inverse_dtype) for layer in layers},
            next(iter(layers)).weight.device,
        )

    @property
    def placement(self) -> Placement:
        """Who does what."""
        return self._arrangement.placement

    @property
    def _defers(self) -> bool:
        return self._arrangement.is_deferred

    @property
    def _is_per_example(self) -> bool:
        return isinstance(self._solver, EKFAC) and self._solver.per_example

    def _waits(self) -> bool:
        """Says whether this factor step's sums wait: no decomposition is due, and none is wanting."""
        return self._defers and not self._agenda.queue and not self._agenda.inverses_are_due

    def _note_call(self, name: str) -> None:
        """Sends statistics as soon as every layer of a bucket was called as often as in the last factor step."""
        self._calls[name] += 1
        before = self._calls_before
        if before is not None and not self._waits():
            self._transport.reduction.send_next(lambda layer: self._calls[layer] >= before[layer], self._take_some)

    def _take_some(self, names: Sequence[str]) -> dict[str, Statistics]:
        local = self._capture.take_some(names)
        return self._deferral.take(local, self._decay.resolve(self.steps), names) if self._defers else local

    def _update_factors(self) -> None:
        local = self._capture.take()
        self._calls_before, self._calls = self._calls, Counter()
        is_silent = not local and not self._calls_before
        if is_silent and self._transport.is_alone:
            self._explain_silence()
            return
        if self._waits():
            self._deferral.add(local, self._decay.resolve(self.steps))
            self._is_deferred = True
        else:
            self._reduce(local, is_silent)
        self._agenda.last_factors = self.steps

    def reduce_statistics(self) -> None:
        """Brings the factors up to date on the ranks that own them, where statistics wait; all ranks call it.

        At COMM-OPT the factors are those of the last decomposition otherwise. Nothing that is computed later changes
        but by rounding.
        """
        if self._is_deferred:
            with torch.no_grad(), self._clock("factors"):
                self._reduce({}, is_silent=False)

    def _reduce(self, local: dict[str, Statistics], is_silent: bool) -> None:
        """Takes this step's sums of all ranks, and those that have waited, into the running average."""
        decay = self._decay.resolve(self.steps)
        if self._defers:
            local = self._deferral.take(local, decay, self._layers)
        self._is_deferred = False
        with self._clock("reduce"):
            totals, counts = self._transport.reduction(local)
        if is_silent and self._transport.reduction.is_nobody_heard(counts):
            self._explain_silence()
        for name, sums in totals.items():
            layer = self._layers[name]
            pair = layer.pair(sums) if self._scaling == "fisher" else _reference_pair(layer, sums)
            kept = 1 - (1 - decay) * sums.steps
            self.factors.update(name, pair.map(self._as_factor), kept, counts[name].is_finite)
        self._take_example_moments(counts)

    def _explain_silence(self) -> None:
        """Raises when backward passes reach the layers but never the hooks; a batch without any is no fault."""
        reached = sum(layer.has_gradient() for layer in self._layers.values())
        if self._agenda.last_factors is not None or not reached:
            return
        if self._fisher.kind != "empirical":
            raise ConfigurationError(
                f"fisher is {self._fisher.kind!r} but nothing was sampled; "
                "call kfac.sample_fisher(outputs) between the forward and the backward pass"
            )
        raise ConfigurationError(
            f"{reached} layers have gradients, but their hooks saw no backward pass: attach K-FAC before the forward "
            "pass, and before a compiled model first runs (or call torch.compiler.reset() after attaching)"
        )

    def _as_factor(self, factor: Tensor) -> Tensor:
        return factor if self._factor_dtype is None else factor.to(self._factor_dtype)

    def _update_inverses(self) -> None:
        if self._agenda.last_factors is not None and self._agenda.inverses_are_due:
            self._look_back()
        self._agenda.line_up()
        if self._agenda.queue:
            with self._clock("inverses"):
                self._agenda.work_off(self._ready, self._refresh)

    def _refresh(self, names: list[str]) -> list[str]:
        """Decomposes what this rank owns of some layers, and takes its column's; returns those that have one now."""
        self._transport.raise_noted()
        means, begun = self._transport.known(names, self.factors, self._ready)
        shifts = {name: solvers.shifts(*means[name], self.damping) for name in begun}
        factors = {
            (name, side): self.factors[name].side(side)
            for name in begun
            for side in (A, G)
            if self._transport.owns(name, side)
        }
        with self._clock("decompose"):
            computed, errors = self._decompositions.compute(factors, {key: shifts[key[0]][key[1]] for key in factors})
        exhausted = self._decompositions.exhausted(errors)
        failed = self._transport.agree_on_failures(begun, errors, exhausted, self._ready)
        made = [name for name in begun if name not in failed]
        with self._clock("share"):
            shared = self._transport.share(made, computed)
        self._decompositions.install(shared)
        self._ready.update(made)
        return made

    def _cost(self, name: str) -> tuple[float, str]:
        shape = self._transport.shapes[name]
        return shape.a.work + shape.g.work, name

    def _precondition(self) -> None:
        stacks, raw, solved = self._solve_alone() if self._transport.is_alone else self._solve_together()
        for names, gradient in zip(stacks, self._bounded(stacks, raw, solved), strict=True):
            for name, matrix in zip(names, gradient.unbind(), strict=True):
                self._layers[name].write_(matrix)

    def _solve_alone(self) -> Solved:
        solved = self._solve(self._decompositions.stacks)
        self._remember(solved[0], solved[1])
        return solved

    def _solve(self, wholes: Sequence[Stack]) -> Solved:
        """Preconditions layers that this rank is a gradient worker of, a stack of equal shapes at a time."""
        names, raw, solved = [], [], []
        for whole in wholes:
            indices = [index for index, name in enumerate(whole.names) if self._layers[name].has_gradient()]
            if indices:
                stack = whole.select(indices)
                gradient = self._stacked(stack.names)
                names.append(stack.names)
                raw.append(gradient)
                exact = gradient.to(stack.a[0].dtype)
                if stack.moments is not None and self._terms_seen is not None:
                    stack.moments.terms = self._terms_seen
                solved.append(self._solver.solve(stack.a, stack.g, exact, self.damping, stack.moments))
                whole.store_moments(indices, stack)
        return names, raw, solved

    def _solve_together(self) -> Solved:
        """Sends what this rank has preconditioned along its row, a bucket while the next is worked on.

        Returns stacks of all layers, equal on every rank, so that the trust region is the same to the bit.
        """
        preconditioned = {name for name in self._ready if self._layers[name].has_gradient()}
        waits = []
        for bucket in self._transport.routes.gradient_buckets:
            names = [name for name in bucket if name in preconditioned]
            stacks, _, solved = self._solve([s for s in self._decompositions.stacks if s.names[0] in bucket])
            waits.append(self._transport.spread(names, _by_name(stacks, solved)))
        with self._clock("spread"):
            everything = {name: matrix for wait in waits for name, matrix in wait().items()}
        groups: dict[object, list[str]] = defaultdict(list)
        for name in filter(preconditioned.__contains__, self._layers):
            groups[everything[name].shape, everything[name].dtype].append(name)
        every = list(groups.values())
        return (
            every,
            [self._stacked(group) for group in every],
            [torch.stack([everything[name] for name in group]) for group in every],
        )

    def _stacked(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self._layers[name].gradient() for name in names])

    def _bounded(self, stacks: list[list[str]], raw: list[Tensor], solved: list[Tensor]) -> list[Tensor]:
        if self._trust_region is None or not stacks:
            return solved
        rates = [
            self._rates.of([self._layers[name].weight for name in names], self.steps, gradient)
            for names, gradient in zip(stacks, solved, strict=True)
        ]
        scales = self._trust_region.scales(raw, solved, rates, self.steps)
        return [gradient * scale for gradient, scale in zip(solved, scales, strict=True)]

    # ------------------------------------------------------------------------------- the Fisher of the prediction

    def sample_fisher(self, outputs: Tensor) -> None:
        """Runs the extra backward passes of a sampled or exact Fisher; does nothing on steps that update no factors.

        Call it between the forward pass and ``loss.backward()``. Gradients of parameters stay as they are.

        Args:
            outputs: what the loss is a function of: logits, or means of a Gaussian.

        Raises:
            ConfigurationError: the Fisher is empirical and needs no sample.
        """
        if self._fisher.kind == "empirical":
            raise ConfigurationError(
                "the empirical Fisher needs no sample_fisher; choose another fisher=, or leave it out"
            )
        if not self._capture.active:
            return
        parameters = [parameter for layer in self._layers.values() for parameter in layer.parameters]
        for index, gradient in enumerate(self._fisher.output_gradients(outputs, self._label_generator)):
            with self._capture.sampling(with_inputs=index == 0):
                torch.autograd.grad(outputs, parameters, gradient, retain_graph=True, allow_unused=True)

    # ------------------------------------------------------------------------------------------------ the placement

    def plan_report(self) -> PlanReport:
        """Returns what was predicted of the placement in use beside what this rank has measured.

        Without a profile of the machine (``hardware``), or with a solver of your own, nothing was predicted.
        """
        measured: dict[str, float] = {**self._clock.means(), "memory": self.memory_usage()["total"]}
        prediction = self._arrangement.prediction
        told: dict[str, float] = {}
        if prediction is not None:
            held = prediction.memory[self._transport.rank]["total"]
            told = {**prediction.seconds, "memory": held}
            told.pop("statistics")  # which depends on the batch, of which the prediction knows nothing
        return PlanReport(self.placement.fraction, self._defers, told, measured, tuple(self._moves))

    def _look_back(self) -> None:
        """Chooses the placement anew when the machine is not what it was taken for; all ranks decide alike."""
        prediction = self._arrangement.prediction
        if (
            self._replan_beyond is None
            or prediction is None
            or self._agenda.last_inverses is None
            or self._agenda.queue
        ):
            return
        seconds = self._clock.means()
        solving = max(0.0, seconds["precondition"] - seconds.get("spread", 0.0))
        own = {**seconds, "solve": solving}
        found = ratios(prediction, Measured.of_ranks(self._transport.everybody([own.get(part, 0.0) for part in PARTS])))
        self._clock.restart()
        if is_off(found, self._replan_beyond):
            chosen = choose_again(self._arranger, self._arrangement, found)
            was = self.placement
            told = ", ".join(f"{part} {ratio:.2f}" for part, ratio in found.items())
            if chosen.placement != was or chosen.is_deferred != self._defers:
                self._move_to(chosen)
                self._moves.append(
                    f"step {self.steps}: took {told} times the prediction; fraction {was.fraction:g} ─► "
                    f"{self.placement.fraction:g}"
                )
            else:
                self._arrangement = chosen
                self._moves.append(f"step {self.steps}: took {told} times the prediction; the placement stays")

    def _move_to(self, arrangement: Arrangement) -> None:
        """Goes on with another placement: factors and decompositions go to those who will work with them."""
        self.reduce_statistics()
        state = self.state_dict()
        old = self._transport
        offered = shards.offered(state, self.placement, old.rank)
        tensors = shards.moved(offered, arrangement.placement, old.collectives, self.device)
        self._arrangement = arrangement
        old.collectives.prepare(groups_of(arrangement.placement))
        self._transport = self._connected(old.collectives)
        self._transport.go_on_from(old)
        own = shards.assembled({**state, **self._signature()}, tensors, self.placement, old.rank)
        self.load_state_dict(own)

    # -------------------------------------------------------------------------------------------- adaptive damping

    def adapt_damping(self, loss: Tensor | float, closure: Callable[[], Tensor | float]) -> None:
        """Compares the actual change of the loss with the model's and adapts λ; call after ``optimizer.step()``.

        Does nothing but on every ``interval``-th step, on which it evaluates the loss once and reads it on the host.

        Args:
            loss: the loss that the step started from.
            closure: evaluates the loss of the same batch with the parameters as they are now.

        Raises:
            ConfigurationError: ``damping`` is no ``LevenbergMarquardt``.
        """
        rule = self._damping.value
        if not isinstance(rule, LevenbergMarquardt):
            raise ConfigurationError("adapt_damping needs damping=LevenbergMarquardt(...)")
        start, self._start = self._start, None
        if start is None:
            return
        active, self._capture.active = self._capture.active, False
        try:
            with torch.no_grad():
                actual = _number(closure()) - _number(loss)
                rule.observe(actual, float(start.change(self.factors)))
        finally:
            self._capture.active = active

    def _damping_is_due(self) -> bool:
        rule = self._damping.value
        return isinstance(rule, LevenbergMarquardt) and self.steps % rule.interval == 0

    def _remember(self, stacks: list[list[str]], raw: list[Tensor]) -> None:
        """Keeps what ``adapt_damping`` needs: where the step starts from and the raw gradients."""
        self._start = None
        if self._damping_is_due():
            matrices = [pair for names, part in zip(stacks, raw, strict=True) for pair in zip(names, part, strict=True)]
            layers = [self._layers[name] for name, _ in matrices]
            self._start = QuadraticModel(layers, dict(matrices), self._model.parameters(), self.damping)

    # ---------------------------------------------------------------------------------------------- what it is told

    def _terms(self) -> float | None:
        return None if self._loss_terms is None else self._loss_terms.resolve(self.steps)

    def _take_example_moments(self, counts: Mapping[str, Counts]) -> None:
        """Hands what this step showed of the spectrum to the solvers that correct eigenvalues."""
        squares = self._transport.total_moments(self._example_moments.take(), self._ready)
        if counts:
            self._terms_seen = _most(count.examples / count.steps for count in counts.values())
        for stack in self._decompositions.stacks:
            if stack.moments is None:
                continue
            if all(name in squares for name in stack.names):
                assert isinstance(self._solver, EKFAC)
                means = [squares[name] / counts[name].examples for name in stack.names]
                stack.moments.take(torch.stack(means), self._solver.decay)

    # ---------------------------------------------------------------------------------------------- what it tells

    def coverage(self) -> Coverage:
        """Returns, layer by layer, what is preconditioned, how, and what is left to the optimizer and why."""
        return self._coverage

    def memory_usage(self) -> dict[str, int]:
        """Returns the bytes held by kind: factors, decompositions, moments, statistics, and their total."""
        usage = {"factors": 0, "decompositions": 0, "moments": 0, "statistics": self._capture.nbytes()}
        usage["statistics"] += self._deferral.nbytes()
        for pair in self.factors.values():
            usage["factors"] += sum(factor.nbytes for factor in pair)
        for kind, tensor in self._decompositions.tensors():
            usage[kind] += tensor.nbytes
        return {**usage, "total": sum(usage.values())}

    def timings(self) -> dict[str, float]:
        """Returns the mean seconds of each phase when it ran: factors, inverses, precondition.

        The making of statistics inside the backward pass is the phase "statistics", in seconds a factor step. Parts of
        phases are "decompose", and the waits "reduce" for statistics, "share" for decompositions and "spread" for
        preconditioned gradients.
        """
        return self._clock.means()

    @property
    def failures(self) -> dict[str, int]:
        """How many decompositions in a row have failed, by layer; layers without failures are absent."""
        return dict(self._decompositions.failures)

    # --------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a run needs to go on to the bit: containers, numbers, copies of tensors.

        On several ranks it is this rank's own share, which fits the same rank under the same placement;
        ``kaisa.kfac.checkpoint`` writes all shares, for any number of ranks.
        """
        rule = self._damping.value
        return {
            "format": states.FORMAT,
            **self._signature(),
            "steps": self.steps,
            "last_factors": self._agenda.last_factors,
            "last_inverses": self._agenda.last_inverses,
            "queue": list(self._agenda.queue),
            "ready": sorted(self._ready),
            "begun": self._transport.begun(self._layers, self.factors),
            "deferred": {"is_waiting": self._is_deferred, "sums": self._deferral.state()},
            "factors": self.factors.state(),
            "decompositions": self._decompositions.state(),
            "failures": dict(self._decompositions.failures),
            "label_generator": self._label_generator.get_state(),
            "example_generator": self._capture.generator.get_state(),
            "damping": rule.value if isinstance(rule, LevenbergMarquardt) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``; the argument is copied and stays as it is.

        Raises:
            StateError: the state is of another model, solver or rank; every difference is said, and nothing has
                changed.
        """
        self.check_state_dict(state)
        devices = {name: layer.weight.device for name, layer in self._layers.items()}
        self._agenda.step = state["steps"]
        self._agenda.last_factors, self._agenda.last_inverses = state["last_factors"], state["last_inverses"]
        self._agenda.queue = list(state["queue"])
        self.factors.restore(state["factors"], devices)
        self._decompositions.restore(state["decompositions"], devices)
        self._ready = set(state["ready"])
        self._transport.restore_begun(state["begun"])
        self._is_deferred = state["deferred"]["is_waiting"]
        self._deferral.restore(state["deferred"]["sums"], devices)
        self._decompositions.failures = dict(state["failures"])
        self._label_generator.set_state(state["label_generator"].cpu())
        self._capture.generator.set_state(state["example_generator"].cpu())
        if isinstance(self._damping.value, LevenbergMarquardt) and state["damping"] is not None:
            self._damping.value.value = state["damping"]
        self._capture.take()
        self._capture.active = self._agenda.factors_are_due

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuses a state that ``load_state_dict`` would refuse.

        Raises:
            StateError: as there.
        """
        differences = states.differences(state, self._signature())
        if differences:
            raise StateError("the state does not belong to this preconditioner:\n  " + "\n  ".join(differences))

    def _signature(self) -> dict[str, Any]:
        """Returns what must be alike to go on from a state."""
        return {
            "share": states.share(self.placement, self._transport.rank),
            "solver": repr(self._solver),
            "scaling": self._scaling,
            "shapes": {name: list(layer.shape) for name, layer in self._layers.items()},
        }

    # --------------------------------------------------------------------------------------------------- its end

    def close(self) -> None:
        """Takes every hook off the model; the factors stay readable."""
        self._capture.active = False
        self._capture.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _by_name(stacks: Sequence[list[str]], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        name: matrix
        for names, gradient in zip(stacks, gradients, strict=True)
        for name, matrix in zip(names, gradient.unbind(), strict=True)
    }


def _most(examples: Iterable[float | Tensor]) -> Tensor:
    """Returns the terms of the loss: those of the layers that all of it passed through, on any placement."""
    return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in examples]).max()


def _number(loss: Tensor | float) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss


def _reference_pair(layer: Layer, sums: Statistics) -> Pair:
    """Returns the factors as the reference implementation scales them: ⟨a aᵀ⟩/S² and ⟨g gᵀ⟩/S² with g = δ/B."""
    if not isinstance(layer, MatrixLayer | Convolution):
        return layer.pair(sums)
    area = sums.area**2
    return Pair(sums.a / (sums.positions * area), sums.g / (sums.scale**2 * sums.positions * area))


def _told(number: Scalar | None) -> str:
    return "a function" if callable(number) else repr(None if number is None else float(number))


def _digest(model: nn.Module) -> str:
    """Returns what tells models with different parameters apart: shapes, types and sums in float64."""
    parameters = dict(model.named_parameters())
    kinds = [(name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in parameters.items()]
    sums = [parameter.detach().double().sum() for parameter in parameters.values()]
    return repr((kinds, torch.stack(sums).cpu().numpy().tobytes()))


def _held_in(layer: Layer, dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if layer.weight.dtype == torch.float64 else dtype
