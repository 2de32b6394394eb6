"""Times the steps of K-FAC side by side with SGD and with other libraries, in one interleaved run.

Every contestant trains its own copy of one model on the same batch. A round runs one step of each kind with each
contestant, in turning order, next to a step of SGD; a ratio is the median over rounds of (step / SGD's step beside
it), so that a slow minute of the machine slows both. Kinds of step:

    plain            gradients are preconditioned with what is held
    factor           and the factors are updated          (factor_update_steps reached)
    inverse          and the factors are decomposed       (inv_update_steps reached)
    factor+inverse   both

The average at (10, 100) is composed of these: 90 plain steps, 9 factor steps and one factor+inverse step in 100;
``--full`` also runs such 100 steps. Also measured: the extra peak memory over SGD, in processes of their own on a CPU;
the error of the preconditioned gradients against float64 arithmetic; and the floor, the operations of
each phase over the measured rate of matrix products.

    python benchmarks/step_time.py --output benchmarks/results/step_time.json
    python benchmarks/step_time.py --device cuda --dtype bf16

Other libraries take part when they can be imported (requirements-peers.txt).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kaisa
from kaisa.recipes.models import build_model

PLAIN, FACTOR, INVERSE, BOTH = "plain", "factor", "inverse", "factor+inverse"
NEVER = 10**9
RATE = 1e-4  # small: the batch never changes and must not be learnt by heart, or gradients become denormal numbers
WARM_UP = (BOTH, PLAIN, FACTOR, INVERSE, PLAIN)


# ------------------------------------------------------------------------------------------------------- workloads


class Transformer(nn.Module):
    """A causal language model of pre-norm encoder layers with a head of its own."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=self.mask.to(x.dtype), is_causal=True)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Workload:
    """A model, its batches, and how many terms its mean loss has (None: one an example)."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss_terms: int | None = None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def resnet20(batch: int = 128) -> Workload:
    return Workload(
        "resnet20",
        lambda: build_model("resnet20", (3, 32, 32), 10),
        lambda: (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))),
    )


def transformer(batch: int = 32, length: int = 128, width: int = 256, layers: int = 4, words: int = 1000) -> Workload:
    return Workload(
        "transformer",
        lambda: Transformer(words, width, 4, layers, length),
        lambda: (torch.randint(words, (batch, length)), torch.randint(words, (batch, length))),
        loss_terms=batch * length,
    )


def tiny() -> Workload:
    """A model for the test of this script."""
    return Workload(
        "tiny",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)),
        lambda: (torch.randn(8, 3, 8, 8), torch.randint(10, (8,))),
    )


WORKLOADS = {"resnet20": resnet20, "transformer": transformer, "tiny": tiny}


# ----------------------------------------------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Settings:
    """What all contestants share."""

    device: str = "cpu"
    autocast: bool = False
    channels_last: bool = False
    seed: int = 0

    def model(self, workload: Workload) -> nn.Module:
        torch.manual_seed(self.seed)
        model = workload.build().to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def batch(self, workload: Workload, index: int = 0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed + 1 + index)
        inputs, targets = (part.to(self.device) for part in workload.batch())
        if self.channels_last and inputs.ndim == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        return inputs, targets


class Trainer:
    """A model and its optimizer; ``plan`` says of which kind each coming step is."""

    kinds: tuple[str, ...] = (PLAIN,)

    def __init__(self, workload: Workload, settings: Settings, rounds: Sequence[str]) -> None:
        self.workload, self.settings = workload, settings
        self.model = settings.model(workload)
        self.plan = [kind for kind in (*WARM_UP, *rounds) if kind in self.kinds]
        self.index = 0

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.zero_grad()
        self.backward(inputs, targets)
        self.update()
        self.index += 1

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def backward(self, inputs: Tensor, targets: Tensor) -> None:
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.autocast):
            loss = self.workload.loss(self.model(inputs), targets)
        loss.backward()

    def update(self) -> None:
        raise NotImplementedError

    def warm_up(self, inputs: Tensor, targets: Tensor) -> None:
        for kind in WARM_UP:
            if kind in self.kinds:
                self.step(inputs, targets)

    def interval(self, *kinds: str) -> Callable[[int], int]:
        """Returns a schedule that is due exactly at the planned steps of some kinds."""
        return lambda step: 1 if step < len(self.plan) and self.plan[step] in kinds else NEVER

    def timings(self) -> dict[str, float]:
        return {}


class SGD(Trainer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)

    def update(self) -> None:
        self.optimizer.step()


class KAISA(SGD):
    kinds = (PLAIN, FACTOR, INVERSE, BOTH)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args)
        self.kfac = kaisa.KFACPreconditioner(
            self.model,
            self.optimizer,
            factor_update_steps=self.interval(FACTOR, BOTH),
            inv_update_steps=self.interval(INVERSE, BOTH),
            loss_terms=self.workload.loss_terms,
            **options,
        )

    def update(self) -> None:
        self.kfac.step()
        self.optimizer.step()

    def timings(self) -> dict[str, float]:
        return self.kfac.timings()


class KFACPytorch(SGD):
    kinds = (PLAIN, FACTOR, INVERSE, BOTH)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from kfac.preconditioner import KFACPreconditioner

        self.kfac = KFACPreconditioner(
            self.model,
            factor_update_steps=_remainders(self.interval(FACTOR, BOTH)),
            inv_update_steps=_remainders(self.interval(INVERSE, BOTH)),
            damping=0.003,
            lr=RATE,
            skip_layers=["attn"],  # the hooks of projections inside nn.MultiheadAttention never fire
            loglevel=0,
        )

    def update(self) -> None:
        self.kfac.step()
        self.optimizer.step()


def _remainders(interval: Callable[[int], int]) -> Callable[[int], int]:
    """Turns an interval into one for libraries that test ``step % interval == 0``."""
    return lambda step: 1 if interval(step) == 1 else step + 1


class SINGD(Trainer):
    """Inverse-free: its factor step is its inverse step. What it does not cover is left to SGD."""

    kinds = (PLAIN, FACTOR)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from singd.optim.optimizer import SINGD as Optimizer

        for module in self.model.modules():  # its hooks on projections inside attention never fire
            if isinstance(module, nn.MultiheadAttention):
                module.out_proj.requires_grad_(False)
        averaged = "batch" if self.workload.loss_terms is None else "batch+sequence"
        self.optimizer = Optimizer(self.model, lr=RATE, warn_unsupported=False, loss_average=averaged)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        others = [p for p in self.model.parameters() if id(p) not in known]
        self.rest = torch.optim.SGD(others, lr=RATE, momentum=0.9) if others else None
        self._schedule(0)

    def update(self) -> None:
        self.optimizer.step()
        if self.rest is not None:
            self.rest.step()
        self._schedule(self.index + 1)

    def _schedule(self, index: int) -> None:
        interval = _remainders(self.interval(FACTOR))(index)
        for group in self.optimizer.param_groups:
            group["T"] = interval


class SOAP(SGD):
    """Updates its factors at every step; its inverse step renews the eigenbases."""

    kinds = (PLAIN, INVERSE)

    def __init__(self, *args: Any) -> None:
        Trainer.__init__(self, *args)
        from pytorch_optimizer import SOAP as Optimizer

        self.optimizer = Optimizer(self.model.parameters(), lr=RATE)

    def update(self) -> None:
        interval = self.interval(INVERSE)(self.index)
        for state in self.optimizer.state.values():
            state["precondition_frequency"] = interval
        self.optimizer.step()


class Muon(SGD):
    """PyTorch's where every weight is a matrix, pytorch-optimizer's where there are convolutions; SGD for the rest."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        hidden = [p for name, p in self.model.named_parameters() if p.ndim > 1 and not _is_outer(name)]
        others = [p for name, p in self.model.named_parameters() if p.ndim == 1 or _is_outer(name)]
        self.rest = torch.optim.SGD(others, lr=RATE, momentum=0.9)
        if all(p.ndim == 2 for p in hidden):
            self.optimizer = torch.optim.Muon(hidden, lr=RATE)
        else:
            from pytorch_optimizer import Muon as Optimizer

            self.optimizer = Optimizer([{"params": hidden, "use_muon": True, "lr": RATE}])

    def update(self) -> None:
        self.optimizer.step()
        self.rest.step()


def _is_outer(name: str) -> bool:
    return name.startswith(("tokens", "positions", "head"))


@dataclass(frozen=True)
class Contestant:
    """How a trainer is made, and which module it needs."""

    make: Callable[..., Trainer]
    options: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None

    def trainer(self, workload: Workload, settings: Settings, rounds: Sequence[str] = ()) -> Trainer:
        return self.make(workload, settings, rounds, **self.options)

    @property
    def is_ours(self) -> bool:
        return self.make is KAISA


CONTESTANTS = {
    "sgd": Contestant(SGD),
    "kaisa eigen": Contestant(KAISA),
    "kaisa quarter": Contestant(KAISA, {"factor_examples": 0.25}),
    "kaisa reduce": Contestant(KAISA, {"sharing": "reduce"}),
    "kaisa cholesky": Contestant(KAISA, {"solver": "cholesky"}),
    "kaisa ekfac": Contestant(KAISA, {"solver": "ekfac"}),
    "kaisa sqrt_ekfac": Contestant(KAISA, {"solver": "sqrt_ekfac"}),
    "kfac-pytorch": Contestant(KFACPytorch, needs="kfac"),
    "singd": Contestant(SINGD, needs="singd"),
    "soap": Contestant(SOAP, needs="pytorch_optimizer"),
    "muon": Contestant(Muon, needs="pytorch_optimizer"),
}


# --------------------------------------------------------------------------------------------------------- timing


def rounds_of(count: int, inverse_every: int) -> list[list[str]]:
    """Returns the kinds of step of each round; the costly ones take part in some rounds only."""
    return [[PLAIN, FACTOR] + ([INVERSE, BOTH] if index % inverse_every == 0 else []) for index in range(count)]


def seconds(call: Callable[[], object], device: str) -> float:
    """Returns how long a call takes until the device has done its work."""
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_steps(
    trainers: dict[str, Trainer], rounds: list[list[str]], batch: tuple[Tensor, Tensor], device: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns, by contestant and kind, quartiles of the milliseconds and of the ratio to SGD's step beside it."""
    for trainer in trainers.values():
        trainer.warm_up(*batch)
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    names = list(trainers)
    try:
        for index, kinds in enumerate(rounds):
            order = names[index % len(names) :] + names[: index % len(names)]
            for kind in kinds:
                taking = [name for name in order if _takes(trainers[name], kind)]
                times = {name: _timed_step(trainers[name], batch, device) for name in taking}
                for name, taken in times.items():
                    samples.setdefault((name, kind), []).append((taken, taken / times["sgd"]))
    except KeyboardInterrupt:
        if not samples:
            raise
    result: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in trainers}
    for (name, kind), pairs in samples.items():
        taken, ratios = zip(*pairs, strict=True)
        result[name][kind] = {"milliseconds": _quartiles(taken, 1000), "ratio": _quartiles(ratios), "steps": len(pairs)}
    return result


def _takes(trainer: Trainer, kind: str) -> bool:
    return kind in trainer.kinds or type(trainer) is SGD


def _timed_step(trainer: Trainer, batch: tuple[Tensor, Tensor], device: str) -> float:
    return seconds(lambda: trainer.step(*batch), device)


def _quartiles(values: Sequence[float], unit: float = 1.0) -> list[float]:
    """Returns the first quartile, the median and the third quartile."""
    parts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return [float(f"{part * unit:.5g}") for part in parts]


def average_at(kinds: dict[str, dict[str, Any]]) -> float | None:
    """Returns the mean step over SGD's at (10, 100); where kinds are fewer, every tenth step is the long one."""
    ratio = {kind: value["ratio"][1] for kind, value in kinds.items()}
    if BOTH in ratio:
        return 0.9 * ratio[PLAIN] + 0.09 * ratio[FACTOR] + 0.01 * ratio[BOTH]
    long = ratio.get(FACTOR if INVERSE not in ratio else INVERSE, ratio.get(PLAIN))
    return None if long is None else 0.9 * ratio[PLAIN] + 0.1 * long


def hundred_steps(
    contestants: dict[str, Contestant], workload: Workload, settings: Settings, batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Runs 100 steps at (10, 100) of each contestant, turn by turn with SGD; returns the ratios of the totals."""
    cycle = [BOTH if step == 0 else FACTOR if step % 10 == 0 else PLAIN for step in range(100)]
    trainers = {name: contestant.trainer(workload, settings, cycle) for name, contestant in contestants.items()}
    trainers = {name: t for name, t in trainers.items() if type(t) is SGD or set(cycle) <= set(t.kinds)}
    for trainer in trainers.values():
        trainer.warm_up(*batch)
    totals = dict.fromkeys(trainers, 0.0)
    for _ in cycle:
        for name, trainer in trainers.items():
            totals[name] += _timed_step(trainer, batch, settings.device)
    return {name: round(total / totals["sgd"], 4) for name, total in totals.items()}


# ---------------------------------------------------------------------------------------------------------- memory


def peak_memory(name: str, workload: Workload, settings: Settings) -> int:
    """Returns the peak bytes of a training run with every kind of step; on a CPU those of this whole process."""
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    batch = settings.batch(workload)
    CONTESTANTS[name].trainer(workload, settings).warm_up(*batch)
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return peak_of_process()


def peak_of_process() -> int:
    """Returns the peak resident bytes. Linux lets ``ru_maxrss`` inherit the parent's, ``VmHWM`` is this program's."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured_memory(
    names: Sequence[str], workload: Workload, settings: Settings, arguments: list[str]
) -> dict[str, int]:
    """Returns the peak bytes of each contestant beyond SGD's."""
    if settings.device == "cuda":
        peaks = {name: peak_memory(name, workload, settings) for name in names}
    else:
        peaks = {name: _peak_in_subprocess(name, workload, arguments) for name in names}
    return {name: peak - peaks["sgd"] for name, peak in peaks.items()}


def _peak_in_subprocess(name: str, workload: Workload, arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--memory-of", name, "--workloads", workload.name]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout.split()[-1])


# -------------------------------------------------------------------------------------------------------- accuracy


def accuracy(contestant: Contestant, workload: Workload, settings: Settings) -> dict[str, float]:
    """Returns, by kind of step, ‖p − p₆₄‖ / ‖p₆₄‖ over all parameters.

    p₆₄ has factors, decompositions and products in float64, of the same activations and gradients. "raw" is the error
    of the gradient before K-FAC sees it, against a model in float64: where an activation lies within rounding of the
    kink of ReLU its gradient is another one, which no preconditioner can mend.
    """
    float64 = {"factor_dtype": torch.float64, "inv_dtype": torch.float64}
    exact = replace(contestant, options={**contestant.options, **float64})
    ours, reference = contestant.trainer(workload, settings), exact.trainer(workload, settings)
    whole = SGD(replace(workload, build=lambda: workload.build().double()), replace(settings, autocast=False), ())
    whole.model.load_state_dict(ours.model.state_dict())
    errors: dict[str, float] = {"raw": 0.0}
    for index, kind in enumerate(ours.plan[:-1]):
        inputs, targets = settings.batch(workload, index)
        for trainer in (ours, reference, whole):
            is_exact = trainer is whole and inputs.is_floating_point()
            trainer.zero_grad()
            trainer.backward(inputs.double() if is_exact else inputs, targets)
        errors["raw"] = max(errors["raw"], _distance(ours.model, whole.model))
        for trainer in (ours, reference):
            trainer.kfac.step()  # type: ignore[attr-defined]
        errors[kind] = max(errors.get(kind, 0.0), _distance(ours.model, reference.model))
    return {kind: float(f"{error:.3g}") for kind, error in errors.items()}


def _distance(model: nn.Module, reference: nn.Module) -> float:
    """Returns the distance of the gradients of two models, relative to the length of the second's."""
    pairs = [
        (p.grad.double(), q.grad.double()) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    distance = sum((p - q).square().sum() for p, q in pairs)
    return float((distance / sum(q.square().sum() for _, q in pairs)).sqrt())


# ----------------------------------------------------------------------------------------------------------- floor


def matrix_product_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Returns the operations per second of the best of some matrix products."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = [seconds(lambda a=first, b=second: a @ b, device) for _ in range(6)]
        rates.append(2 * size**3 / min(times))
    return max(rates)


def operations(workload: Workload, settings: Settings) -> dict[str, float]:
    """Returns the operations of each phase, all examples and ``expand``, for matrix products that use symmetry.

    A symmetric product of n columns takes n(n+1) operations a row. A convolution's input factor has one C × C block
    for each pair of taps, and pairs that the stride's phase and the offset make equal are counted once, of two that
    are transposes of each other one: 13 of 81 for 3 × 3 taps and stride 1. A decomposition is counted as 6n³:
    tridiagonal form 4/3, divide and conquer 8/3, back-transformation 2. Element-wise work (normalisation layers,
    copies) is not counted: it is bound by memory, not by operations.
    """
    model = settings.model(workload)
    inputs, _ = settings.batch(workload)
    kfac = kaisa.KFACPreconditioner(model, lr=RATE, loss_terms=workload.loss_terms)
    rows: dict[str, tuple[nn.Module, torch.Size, torch.Size]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, out, name=name: rows.update({name: (m, args[0].shape, _shape(out))})
        )
    model(inputs)
    workload.loss(model(inputs), settings.batch(workload)[1]).backward()
    kfac.step()
    total = {"statistics": 0.0, "inverses": 0.0, "precondition": 0.0}
    for name, pair in kfac.factors.items():
        sides = [factor.shape[-1] if factor.ndim > 1 else 0 for factor in (pair.a, pair.g)]
        if pair.a.ndim == 3:  # a block a channel or group: small
            continue
        module, x, y = rows[name] if name in rows else rows[name.rsplit(".", 1)[0]]
        total["statistics"] += _factor_operations(module, sides, x, y)
        total["inverses"] += sum(6.0 * side**3 for side in sides)
        outputs, columns = pair.g.shape[-1], pair.a.shape[-1]
        total["precondition"] += 4.0 * outputs * columns * sum(sides)
    kfac.close()
    return total


def _shape(output: Any) -> torch.Size:
    return output[0].shape if isinstance(output, tuple) else output.shape


def _factor_operations(module: nn.Module, sides: list[int], x: torch.Size, y: torch.Size) -> float:
    if isinstance(module, nn.Conv2d):
        positions = y[0] * math.prod(y[2:])
        blocks = math.prod(map(_distinct_pairs, module.kernel_size, module.stride))
        return float(positions * (module.in_channels**2 * (blocks + 1) + sides[1] * (sides[1] + 1)))
    positions = math.prod(y[:-1])
    return float(positions * sum(side * (side + 1) for side in sides))


def _distinct_pairs(taps: int, stride: int) -> int:
    return len({(first % stride, second - first) for first, second in itertools.product(range(taps), repeat=2)})


# ---------------------------------------------------------------------------------------------------------- report


def measure(workload: Workload, settings: Settings, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures everything about one workload."""
    batch = settings.batch(workload)
    rounds = rounds_of(options.rounds, options.inverse_every)
    kinds = list(itertools.chain.from_iterable(rounds))
    chosen = {name: CONTESTANTS[name] for name in options.contestants}
    trainers: dict[str, Trainer] = {}
    absent: dict[str, str] = {}
    for name, contestant in chosen.items():
        problem = _problem(contestant, workload, settings, batch)
        if problem:
            absent[name] = problem
        else:
            trainers[name] = contestant.trainer(workload, settings, kinds)
    console.log(f"{workload.name}: {len(rounds)} rounds of {', '.join(trainers)}")
    steps = measure_steps(trainers, rounds, batch, settings.device)
    result: dict[str, Any] = {"steps": steps, "absent": absent}
    result["average"] = {name: average_at(kinds) for name, kinds in steps.items() if PLAIN in kinds}
    result["timings_ms"] = {
        name: {phase: round(1000 * value, 3) for phase, value in trainer.timings().items()}
        for name, trainer in trainers.items()
        if trainer.timings()
    }
    present = list(trainers)
    trainers.clear()
    if options.full:
        console.log(f"{workload.name}: 100 steps at (10, 100)")
        result["hundred_steps"] = hundred_steps({n: chosen[n] for n in present}, workload, settings, batch)
    if not options.no_memory:
        console.log(f"{workload.name}: memory")
        result["extra_peak_bytes"] = measured_memory(present, workload, settings, _shared_arguments(options))
    ours = [name for name in present if chosen[name].is_ours]
    console.log(f"{workload.name}: accuracy")
    result["relative_error"] = {name: accuracy(chosen[name], workload, settings) for name in ours}
    rate = matrix_product_rate(settings.device)
    counts = operations(workload, settings)
    sgd = steps["sgd"][PLAIN]["milliseconds"][1]
    result["floor"] = {
        "matrix_products_gflops": round(rate / 1e9, 1),
        "gigaoperations": {phase: round(count / 1e9, 3) for phase, count in counts.items()},
        "milliseconds": {phase: round(1000 * count / rate, 3) for phase, count in counts.items()},
        "factor_step_ratio": round(1 + 1000 * (counts["statistics"] + counts["precondition"]) / rate / sgd, 3),
        "plain_step_ratio": round(1 + 1000 * counts["precondition"] / rate / sgd, 3),
    }
    result["targets"] = targets(result)
    return result


def _problem(
    contestant: Contestant, workload: Workload, settings: Settings, batch: tuple[Tensor, Tensor]
) -> str | None:
    """Returns why a contestant cannot take part, after a trial of every kind of step."""
    if contestant.needs is not None and importlib.util.find_spec(contestant.needs) is None:
        return f"{contestant.needs} is not installed"
    if contestant.is_ours or contestant.make is SGD:
        return None
    try:
        contestant.trainer(workload, settings).warm_up(*batch)
    except Exception as error:  # another library's failure is a result, not a reason to stop
        return f"{type(error).__name__}: {error}"[:300]
    return None


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns each goal of the project with what was measured."""
    rows: list[tuple[str, float | None, float]] = []
    for name, kind, bound in (
        ("kaisa eigen", FACTOR, 2.0),
        ("kaisa quarter", FACTOR, 1.3),
        ("kaisa reduce", FACTOR, 1.3),
        ("kaisa eigen", PLAIN, 1.08),
    ):
        measured = result["steps"].get(name, {}).get(kind)
        rows.append((f"{name}: {kind} step / SGD", measured and measured["ratio"][1], bound))
    rows.append(("kaisa eigen: average at (10, 100) / SGD", result["average"].get("kaisa eigen"), 1.15))
    if "hundred_steps" in result:
        rows.append(("kaisa eigen: 100 steps at (10, 100) / SGD", result["hundred_steps"].get("kaisa eigen"), 1.15))
    memory = result.get("extra_peak_bytes", {})
    if "kfac-pytorch" in memory and "kaisa eigen" in memory:
        ratio = memory["kaisa eigen"] / max(1, memory["kfac-pytorch"])
        rows.append(("kaisa eigen: extra peak memory / kfac-pytorch's", ratio, 0.5))
    for name, kinds in result["relative_error"].items():
        rows.append((f"{name}: largest relative error of a gradient", _largest_error(kinds), 1e-4))
    return [
        {"goal": goal, "bound": bound, "measured": measured, "met": measured <= bound}
        for goal, measured, bound in rows
        if measured is not None
    ]


def _largest_error(kinds: dict[str, float]) -> float:
    return max(error for kind, error in kinds.items() if kind != "raw")


def tables(name: str, result: dict[str, Any]) -> Iterator[Table]:
    table = Table(title=f"{name}: median step over SGD's step ({_sgd_milliseconds(result):.0f} ms)")
    for column in ("", PLAIN, FACTOR, INVERSE, BOTH, "average", "extra peak MiB", "largest error"):
        table.add_column(column, justify="left" if not column else "right")
    for contestant, kinds in result["steps"].items():
        errors = result["relative_error"].get(contestant, {})
        memory = result.get("extra_peak_bytes", {}).get(contestant)
        table.add_row(
            contestant,
            *(f"{kinds[kind]['ratio'][1]:.3f}" if kind in kinds else "" for kind in (PLAIN, FACTOR, INVERSE, BOTH)),
            f"{result['average'][contestant]:.3f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            f"{_largest_error(errors):.1e}" if errors else "",
        )
    for contestant, reason in result["absent"].items():
        table.add_row(contestant, f"[dim]{reason.splitlines()[0][:60]}[/dim]")
    yield table
    phases = Table(title=f"{name}: milliseconds of each phase when it ran, and the floor (operations over GEMM rate)")
    names = ("statistics", "factors", "inverses", "precondition")
    for column in ("", *names):
        phases.add_column(column, justify="left" if not column else "right")
    for contestant, timings in result["timings_ms"].items():
        phases.add_row(contestant, *(f"{timings[phase]:.2f}" if phase in timings else "" for phase in names))
    floor = result["floor"]["milliseconds"]
    phases.add_row("floor, all examples", *(f"{floor[phase]:.2f}" if phase in floor else "" for phase in names))
    yield phases
    goals = Table(title=f"{name}: goals")
    for column in ("goal", "at most", "measured", "met"):
        goals.add_column(column)
    for row in result["targets"]:
        met = "[green]yes[/green]" if row["met"] else "[red]no[/red]"
        goals.add_row(row["goal"], f"{row['bound']:g}", f"{row['measured']:.3g}", met)
    yield goals


def _sgd_milliseconds(result: dict[str, Any]) -> float:
    return float(result["steps"]["sgd"][PLAIN]["milliseconds"][1])


def machine(device: str) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or None


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["resnet20", "transformer"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="bf16 is autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inverse-every", type=int, default=4, help="rounds between those with inverse steps")
    parser.add_argument("--full", action="store_true", help="also run 100 steps at (10, 100)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON, written after each workload")
    parser.add_argument("--resume", action="store_true", help="keep the workloads that --output already holds")
    parser.add_argument("--memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if "sgd" not in options.contestants:
        options.contestants.insert(0, "sgd")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that PyTorch can use")
    return options


def _shared_arguments(options: argparse.Namespace) -> list[str]:
    shared = ["--device", options.device, "--dtype", options.dtype, "--seed", str(options.seed)]
    shared += ["--threads", str(options.threads)]
    return [*shared, "--channels-last"] if options.channels_last else shared


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning, message="Full backward hook is firing|NVIDIA Apex")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # matrix products have it off by default; errors are those of float32
    settings = Settings(options.device, options.dtype == "bf16", options.channels_last, options.seed)
    for contestant in CONTESTANTS.values():  # in every process, so that peaks of memory hold the same modules
        if contestant.needs is not None and importlib.util.find_spec(contestant.needs) is not None:
            importlib.import_module(contestant.needs)
    if options.memory_of:
        print(peak_memory(options.memory_of, WORKLOADS[options.workloads[0]](), settings))
        return
    console = Console()
    report: dict[str, Any] = {"workloads": {}}
    if options.resume and options.output and options.output.exists():
        report["workloads"] = json.loads(options.output.read_text())["workloads"]
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(options.device),
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("output", "resume", "memory_of")
        },
        **report,
    }
    for name in options.workloads:
        if name not in report["workloads"]:
            report["workloads"][name] = measure(WORKLOADS[name](), settings, options, console)
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
        for table in tables(name, report["workloads"][name]):
            console.print(table)


if __name__ == "__main__":
    main()
