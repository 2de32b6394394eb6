"""What a comparison is told, checked as a whole before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from kaisa.errors import ConfigurationError
from kaisa.kfac.arrangement import AUTO
from kaisa.kfac.placement import gradient_workers
from kaisa.quantize import QuantConfig
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, SCENES, TEXT, Recipe, find_model, find_recipe
from kaisa.recipes.contestants import ADAHESSIAN, Contestant, Preconditioning
from kaisa.recipes.images import WORKERS
from kaisa.recipes.tasks import Score, Task
from kaisa.recipes.text import SPECIAL, UNITS
from kaisa.schedules import FRACTION, POSITIVE, STEPS, Range, Schedule

CONTESTANTS = ("both", "first-order", "kfac")
DEVICES = ("cpu", "cuda")
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
COUNTS = ("epochs", "batch_size", "repeats", "threads", "image_size", "nproc", "crop", "positions", "workers")
USED_BY = {
    "crop": (MASKED_IMAGES,),
    "positions": (TEXT,),
    "unit": (TEXT,),
    "vocabulary": (TEXT,),
    "image_size": (IMAGES, SCENES),
    "augment": (IMAGES, MASKED_IMAGES, SCENES),
    "workers": (IMAGES, MASKED_IMAGES, SCENES),
}
"""The kinds of data that an option is for; of the others it would change nothing."""
OF_FILES = ("test_data", "image_size", "workers")  # the digits that need no file have no use for them
SEED = Range("a whole number of at least 0 and below 1000000", 0, 1e6, False, True, whole=True)
TOKENS = Range("a whole number of at least 3: two tokens stand for no word", SPECIAL + 1, whole=True)

LEARNING_RATES = {"sgd": 0.1, "adam": 0.003, "adamw": 0.003, "rsg": 1.0, "arsg": 0.01, ADAHESSIAN: 0.15}
"""What is taken for learning rates that are not given: of SGD the one that suits it best on the digits (see
`benchmarks/digits_learning_rates.py`), of the others customary ones of the same data."""


@dataclass(frozen=True)
class Options:
    """One comparison, complete: the same options on the same machine give the same run.

    Attributes:
        recipe: a name of `kaisa.recipes.catalogue.RECIPES`.
        data: folder or zip file; None for the handwritten digits.
        test_data: likewise; None for NAME-test beside NAME-train, or a share held out.
        image_size: width and height that images are resized to.
        crop: width and height of crops of images with masks.
        positions: tokens of a sequence.
        unit: of text: "characters" or "words".
        vocabulary: the most tokens that are told apart.
        workers: threads that decode images; None for `kaisa.recipes.images.WORKERS`. The result does not depend on it.
        model: a name of those of the recipe.
        contestants: "both", "first-order" or "kfac".
        optimizer: a name of `kaisa.recipes.contestants.OPTIMIZERS`.
        lr: the highest learning rate of the first-order contestant.
        kfac_lr: that of the contestant behind K-FAC; None for the same.
        weight_decay: of both.
        epochs: of each run.
        batch_size: examples in a batch.
        augment: whether images are shifted and mirrored at random.
        preconditioning: the options of K-FAC.
        seed: of weights, batches and the split; repetition i has seed + i.
        repeats: how many seeds each contestant runs with.
        target: the score that is raced for; None for the best that all contestants reach.
        threads: of the processor; None for as many as PyTorch takes.
        device: "cpu" or "cuda".
        precision: "float32", or "bfloat16" for mixed precision.
        quantize: what is computed in few bits, as `kaisa.quantize.QuantConfig.read` takes it, such as "bhq:5"; None for
            nothing.
        tensorboard: whether losses and scores are written for TensorBoard too.
        nproc: processes that share each batch.

    Raises:
        ConfigurationError: an option cannot work.
    """

    model: str
    epochs: int
    batch_size: int
    lr: float
    recipe: str = "digits"
    data: str | None = None
    test_data: str | None = None
    image_size: int | None = None
    crop: int | None = None
    positions: int | None = None
    unit: str | None = None
    vocabulary: int | None = None
    workers: int | None = None
    contestants: str = "both"
    optimizer: str = "sgd"
    kfac_lr: float | None = None
    weight_decay: float = 5e-4
    augment: bool = False
    preconditioning: Preconditioning = field(default_factory=Preconditioning)
    seed: int = 0
    repeats: int = 1
    target: float | None = None
    threads: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    quantize: str | None = None
    tensorboard: bool = False
    nproc: int = 1

    def __post_init__(self) -> None:
        find_model(self.recipe, self.model)
        for name in COUNTS:
            self._check(name, STEPS)
        self._check("vocabulary", TOKENS)
        self._check("seed", SEED)
        self._check("target", POSITIVE if self.score.is_cost else FRACTION)
        self._check_recipe()
        self._check("kfac_lr", POSITIVE)
        self._check_choice("contestants", CONTESTANTS)
        self._check_choice("device", DEVICES)
        self._check_choice("precision", tuple(PRECISIONS))
        if self.quantize is not None:
            QuantConfig.read(self.quantize)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("device is cuda, but PyTorch finds none; give --device cpu")
        self._check_sharing()
        if self.preconditioning.grad_worker_fraction != AUTO:
            gradient_workers(self.preconditioning.grad_worker_fraction, self.nproc)
        self.build_contestants()

    def _check_recipe(self) -> None:
        """Refuse options that would change nothing, and a lack of data."""
        kind = self.known_recipe.kind
        self._refuse([name for name, kinds in USED_BY.items() if kind not in kinds], "leave it out")
        if self.data is None and not self.known_recipe.has_data:
            raise ConfigurationError(f"the recipe {self.recipe} needs --data, a folder or zip file")
        if self.data is None:
            self._refuse(OF_FILES, "leave it out, or give --data")
        if kind == TEXT:
            self._check_choice("unit", tuple(UNITS))

    def _refuse(self, names: Sequence[str], advice: str) -> None:
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if given:
            option = given[0].replace("_", "-")
            raise ConfigurationError(f"the recipe {self.recipe} has no use for --{option}; {advice}")

    def _check_sharing(self) -> None:
        """Equal parts of a batch make the mean over ranks the mean over the batch."""
        over = self.batch_size % self.nproc
        if over:
            sizes = [size for size in (self.batch_size - over, self.batch_size - over + self.nproc) if size]
            raise ConfigurationError(
                f"nproc is {self.nproc}, which does not divide a batch of {self.batch_size} examples; "
                f"give --batch-size {' or '.join(map(str, sizes))}"
            )

    def _check(self, name: str, allowed: Range) -> None:
        value = getattr(self, name)
        if value is not None:
            Schedule(name.replace("_", "-"), value, allowed)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigurationError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")

    @classmethod
    def complete(cls, given: dict[str, Any]) -> Options:
        """Make options of those given (not None); the others come from the preset of the recipe.

        Those of K-FAC are given by their own names. An optimizer that ends in "+kfac" takes part behind K-FAC alone.

        Raises:
            ConfigurationError: an option cannot work.
        """
        given = _read_optimizer({name: value for name, value in given.items() if value is not None})
        recipe = given.setdefault("recipe", "resnet" if "data" in given else "digits")
        preset = dict(find_recipe(recipe).preset)
        usual = preset.get("optimizer", "sgd")
        optimizer = given.get("optimizer", usual)
        if optimizer != usual:
            preset.pop("lr", None)  # it is for the usual optimizer
        merged = {"lr": LEARNING_RATES.get(optimizer, math.nan), **preset, **given}
        if "fisher_norm" in merged:
            merged.setdefault("kl_clip", 0.0)
        own = {option.name for option in fields(Preconditioning)} & set(merged)
        preconditioning = Preconditioning(**{name: merged.pop(name) for name in own})
        return cls(preconditioning=preconditioning, **merged)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Options:
        """Make the options that `to_json` was called on."""
        return cls(**{**value, "preconditioning": Preconditioning(**value["preconditioning"])})

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON takes them."""
        return asdict(self)

    def build_contestants(self) -> list[Contestant]:
        """Return who takes part, the first-order contestant before the other."""
        rate = self.lr if self.kfac_lr is None else self.kfac_lr
        found = []
        if self.contestants != "kfac":
            found.append(Contestant(self.optimizer, self.lr, weight_decay=self.weight_decay))
        if self.contestants != "first-order":
            alone = Contestant(self.optimizer, rate, weight_decay=self.weight_decay)
            found.append(replace(alone, preconditioning=self.preconditioning))
        return found

    @property
    def known_recipe(self) -> Recipe:
        """The recipe that has the name."""
        return find_recipe(self.recipe)

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.known_recipe.task

    @property
    def score(self) -> Score:
        """What is raced for."""
        return self.task.score

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of mixed precision; None for none."""
        return PRECISIONS[self.precision]

    @property
    def readers(self) -> int:
        """How many threads decode images."""
        return WORKERS if self.workers is None else self.workers

    @property
    def seeds(self) -> list[int]:
        """The seed of each repetition."""
        return [self.seed + index for index in range(self.repeats)]

    @property
    def title(self) -> str:
        """Data and model in a word that can be a file name."""
        data = "digits" if self.data is None else Path(self.data).name.split(".")[0]
        return f"{data}-{self.model}"


def _read_optimizer(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options given, with "+kfac" read and contestants that suit the optimizer."""
    name, plus, system = given.get("optimizer", "sgd").partition("+")
    if not plus:
        usual = {"contestants": "first-order"} if name == ADAHESSIAN else {}  # it cannot stand behind K-FAC
        return {**usual, **given}
    if system != "kfac":
        raise ConfigurationError(f"unknown optimizer {given['optimizer']!r}; only +kfac may follow a name")
    if given.get("contestants", "kfac") != "kfac":
        raise ConfigurationError(
            f"optimizer {given['optimizer']} is for the contestant behind K-FAC alone; leave out +kfac or --contestants"
        )
    return {**given, "optimizer": name, "contestants": "kfac"}
