"""One contestant's training, an epoch at a time.

    Training.start ─► epoch ─► epoch ─► …        all state is in the Training, so that
                        └─► save ─► load ─► epoch   a resumed run is bitwise the uninterrupted one

Seconds and peak memory are those of training alone: forward, backward, preconditioning, update and the preparation
of batches, without evaluation, checkpoints or reports.

Several ranks train one model: each on its part of a batch, with gradients averaged by DistributedDataParallel. The
first evaluates and writes; the file holds the K-FAC state and the random numbers of every rank. Weights begin equal;
what is drawn later differs from rank to rank, as the noise of training in few bits must.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kaisa
from kaisa.errors import StateError
from kaisa.kfac.collectives import Alone, Collectives
from kaisa.kfac.gathering import gathered, own_part
from kaisa.optim import AdaHessian
from kaisa.quantize import load_ranges, ranges_of
from kaisa.recipes.contestants import Contestant, learning_rate_share
from kaisa.recipes.files import written_whole
from kaisa.recipes.memory import measure_peak_memory, reset_peak_memory
from kaisa.recipes.tasks import Batches, Lesson, Score, Task

WARM_UP_STEPS = 3

StepWatcher = Callable[[float, float], None]
"""Told the mean loss and the score of the epoch so far, after each step."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought.

    Attributes:
        number: counted from 1.
        train_loss: mean over the epoch's batches, measured before each update.
        train_score: the score that is raced for, likewise.
        test_loss: after the epoch, over all that is tested on.
        test_score: likewise.
        seconds: of training, from the start of the run to the end of this epoch.
        further: the other scores over all that is tested on, by name.
    """

    number: int
    train_loss: float
    train_score: float
    test_loss: float
    test_score: float
    seconds: float
    further: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """Sums over batches, which add up over ranks.

    Attributes:
        loss: summed over terms.
        terms: how many there are.
        scores: two sums of each score of the task.
    """

    loss: Tensor
    terms: Tensor
    scores: Tensor

    @classmethod
    def none(cls, task: Task, device: torch.device) -> Figures:
        """Return the sums over nothing."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero, zero, torch.zeros(len(task.scores), 2, dtype=torch.float64, device=device))

    def plus(self, task: Task, loss: Tensor, outputs: Any, targets: Tensor) -> Figures:
        """Return the sums with one more batch."""
        terms = task.terms(targets)
        sums = [score.sums(loss.double(), terms, outputs, targets) for score in task.scores]
        scores = torch.stack([torch.stack([side.double() for side in sides]) for sides in sums])
        return Figures(self.loss + loss.double() * terms, self.terms + terms, self.scores + scores)

    def total(self, ranks: Collectives) -> Figures:
        """Return the sums over ranks."""
        if ranks.world_size == 1:
            return self
        own = torch.cat([self.loss.reshape(1), self.terms.double().reshape(1), self.scores.flatten()])
        everybody = tuple(range(ranks.world_size))
        loss, terms, *scores = ranks.total("figures", everybody, own)
        return Figures(loss, terms, torch.stack(scores).reshape(self.scores.shape))

    def means(self) -> tuple[float, list[float]]:
        """Return the mean loss and the scores; a score of nothing is not a number."""
        return (self.loss / self.terms).item(), (self.scores[:, 0] / self.scores[:, 1]).tolist()


@dataclass
class Training:
    """A contestant on its way: everything that the next epoch depends on.

    Attributes:
        parallel: the model itself, or around it what averages gradients over ranks.
        ranks: how to reach the other processes.
        peak_memory: the most bytes that were held while it trained; None before, or if the system does not tell.
    """

    contestant: Contestant
    lesson: Lesson
    epochs: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    kfac: kaisa.KFACPreconditioner | None
    parallel: nn.Module
    ranks: Collectives = field(default_factory=Alone)
    history: list[Epoch] = field(default_factory=list)
    peak_memory: int | None = None

    @classmethod
    def start(
        cls,
        contestant: Contestant,
        lesson: Lesson,
        epochs: int,
        ranks: Collectives | None = None,
    ) -> Training:
        """Begin with weights of the batches' seed, the same for all contestants and ranks."""
        batches = lesson.batches
        torch.manual_seed(batches.seed)
        model = lesson.build().to(batches.device)
        optimizer = contestant.build_optimizer(model)
        ranks = ranks or Alone()
        parallel = model if ranks.world_size == 1 else DistributedDataParallel(model)
        kfac = contestant.build_preconditioner(parallel, optimizer, batches.seed, ranks, batches.terms)
        _part_random_numbers(ranks.rank)
        return cls(contestant, lesson, epochs, model, optimizer, kfac, parallel, ranks)

    @property
    def batches(self) -> Batches:
        """What is learned from."""
        return self.lesson.batches

    @property
    def score(self) -> Score:
        """What is raced for."""
        return self.lesson.task.score

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.epochs

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.history[-1].seconds if self.history else 0.0

    def epoch(self, watch: StepWatcher | None = None) -> Epoch:
        """Train for an epoch, then evaluate."""
        reset_peak_memory(self.batches.device)
        start = time.perf_counter()
        trained = self._train(watch)
        seconds = self.seconds + time.perf_counter() - start
        self._note_peak_memory()
        loss, (score, *_) = trained.total(self.ranks).means()
        test_loss, (test_score, *others) = self._evaluate().means()
        further = {score.name: value for score, value in zip(self.lesson.task.scores[1:], others, strict=True)}
        number = len(self.history) + 1
        self.history.append(Epoch(number, loss, score, test_loss, test_score, seconds, further))
        return self.history[-1]

    def _note_peak_memory(self) -> None:
        known = [size for size in (self.peak_memory, measure_peak_memory(self.batches.device)) if size is not None]
        self.peak_memory = max(known, default=None)

    def _evaluate(self) -> Figures:
        """Evaluate on the first rank, whose running statistics are those that are kept, and tell the others."""
        nothing = Figures.none(self.lesson.task, self.batches.device)
        return (evaluate(self.model, self.lesson) if self.ranks.rank == 0 else nothing).total(self.ranks)

    def _train(self, watch: StepWatcher | None) -> Figures:
        """Take the steps of one epoch; return the sums over this rank's parts of the batches."""
        self.model.train()
        epoch, steps = len(self.history), len(self.batches)
        task = self.lesson.task.raced
        figures = Figures.none(task, self.batches.device)
        for index, (inputs, targets) in enumerate(self.batches.epoch(epoch)):
            share = learning_rate_share(epoch * steps + index, self.epochs * steps)
            self._set_learning_rate(share * self.contestant.learning_rate)
            loss, outputs = self.step(inputs, targets)
            figures = figures.plus(task, loss, outputs, targets)
            if watch is not None:
                loss_so_far, (score, *_) = figures.means()
                watch(loss_so_far, score)
        return figures

    def step(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Any]:
        """Take one step; return the loss and the outputs before it."""
        self.optimizer.zero_grad()
        with mixed_precision(self.lesson):
            outputs = self.parallel(inputs)
            loss = self.lesson.task.loss(outputs, targets)
        if isinstance(self.optimizer, AdaHessian):
            self.optimizer.backward(loss)
        else:
            loss.backward()
        if self.kfac is not None:
            self.kfac.step()
        self.optimizer.step()
        return loss.detach(), outputs.detach()

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and text, all that `load_state_dict` needs; complete on the first rank."""
        return {
            "contestant": self.contestant.slug,
            "seed": self.batches.seed,
            "model": self.model.state_dict(),
            "ranges": ranges_of(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ranks": gathered(self._own_state(), self.ranks, self.batches.device),
            "peak_memory": self.peak_memory,
            "history": [asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            StateError: it is the state of another contestant, seed or number of ranks, or of an earlier version.
        """
        if "ranks" not in state:
            raise StateError(
                "the checkpoint is of an earlier version, which kept the random numbers of one processor alone; "
                "start the run anew"
            )
        found = state["contestant"], state["seed"]
        expected = self.contestant.slug, self.batches.seed
        if found != expected:
            raise StateError(f"the checkpoint is of {found}, expected {expected}")
        own = own_part(state["ranks"], self.ranks)
        self._load_weights(state["model"])
        load_ranges(self.model, state.get("ranges", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.kfac is not None:
            self.kfac.load_state_dict(own["kfac"])
        set_random_state(own["random"], self.batches.device)
        self.peak_memory = state["peak_memory"]
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise StateError(f"the checkpoint is of another model than the one that is made here: {reason}") from error

    def _own_state(self) -> dict[str, Any]:
        """Return what differs from rank to rank."""
        return {
            "kfac": None if self.kfac is None else self.kfac.state_dict(),
            "random": random_state(self.batches.device),
        }

    def close(self) -> None:
        """Take the hooks off the model."""
        if self.kfac is not None:
            self.kfac.close()


def _part_random_numbers(rank: int) -> None:
    """Let the ranks, which have drawn the same so far, draw differently from now on; the first goes on as if alone."""
    if rank:
        torch.manual_seed(int(torch.randint(2**31, (rank,))[-1]))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that a training on a device draws from, the processor's among them."""
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Let the generators go on from where `random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.cuda.set_rng_state(state["cuda"], device)


def mixed_precision(lesson: Lesson) -> torch.autocast:
    """Return what runs a forward pass in the precision of a lesson."""
    return torch.autocast(lesson.batches.device.type, dtype=lesson.dtype, enabled=lesson.dtype is not None)


@torch.no_grad()
def evaluate(model: nn.Module, lesson: Lesson) -> Figures:
    """Return the sums over all that a lesson tests on."""
    model.eval()
    figures = Figures.none(lesson.task, lesson.batches.device)
    for inputs, targets in lesson.tests:
        with mixed_precision(lesson):
            outputs = model(inputs)
            loss = lesson.task.loss(outputs, targets)
        figures = figures.plus(lesson.task, loss, outputs, targets)
    return figures


def warm_up(training: Training) -> None:
    """Take a few steps of a training that is then thrown away.

    What the first steps of a process cost, such as starting threads, is no contestant's.
    """
    training.model.train()
    for inputs, targets in islice(training.batches.epoch(0), WARM_UP_STEPS):
        training.step(inputs, targets)
    training.close()


def save(training: Training, path: Path) -> None:
    """Write the state of a training on its first rank; an interruption leaves the old file or the new one."""
    state = training.state_dict()
    if training.ranks.rank == 0:
        with written_whole(path) as partial:
            torch.save(state, partial)


def load(training: Training, path: Path) -> None:
    """Go on from a file that `save` wrote; nothing in it is executed."""
    training.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
