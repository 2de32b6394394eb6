"""The network of a run as a safety case asks it: what it says to inputs, and on which of them it fails.

    classifiers    a wrong class; less sure than `sure`, it declines
    unet           an image whose Dice is below `dice`
    gpt, bert      a sequence whose mean loss over what it predicts is above `loss`
    all            what makes an output that is not a number

Inputs are told apart by the SHA-256 of what the network sees, images from 0 to 1 or numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kaisa.assure.evidence.findings import digest_input
from kaisa.assure.network import DECLINED, UNDEFINED, Criterion, Demand
from kaisa.errors import ConfigurationError
from kaisa.recipes.batches import ImageTests
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, TEXT
from kaisa.recipes.crops import WholeImages
from kaisa.recipes.data import ImageData, MaskedImageData
from kaisa.recipes.images import match_images, read_images
from kaisa.recipes.masks import read_masked_images
from kaisa.recipes.sequences import TestSequences
from kaisa.recipes.tasks import DICE, IGNORED, Batch
from kaisa.recipes.text import read_text_file
from kaisa.recipes.trained import Trained, read_trained

AT_ONCE = 256
CRITERIA = {IMAGES: "sure", MASKED_IMAGES: "dice", TEXT: "loss"}
"""What each kind of network is judged by."""


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of a run; see `kaisa.assure.network.Network`.

    Attributes:
        trained: the run.
        criterion: when a demand has failed.
    """

    trained: Trained
    criterion: Criterion

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.trained.weights

    def try_out(self, data: Path | None) -> list[Demand]:
        """Run it on a folder or zip file of images, on a file of text, or on what the run was tested on."""
        return [demand for inputs, targets in self._tests(data) for demand in self._judge(inputs, targets)]

    def learned(self) -> frozenset[str] | None:
        """Return the digest of each image that it has learned from; None of text.

        Raises:
            DataError: the images are gone.
        """
        data = self.trained.read_data()
        if not isinstance(data, ImageData | MaskedImageData):
            return None
        seen = replace(self.trained.tests(), images=data.train)  # type: ignore[type-var]
        return frozenset(digest_input(row) for inputs, _ in seen for row in inputs)

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """Return the digest of what it sees of each image file."""
        return [digest_input(self.trained.image(path)[0]) for path in paths]

    def answer(self, paths: Sequence[Path]) -> list[str]:
        """Return the class that it says each image file shows, `DECLINED` or `UNDEFINED`."""
        if self.trained.kind != IMAGES:
            raise ConfigurationError(
                f"a run of {self.trained.options.recipe} does not answer an image by a class; give records of its "
                "demands with failure"
            )
        said: list[str] = []
        for start in range(0, len(paths), AT_ONCE):
            said += self._say(torch.cat([self.trained.image(path) for path in paths[start : start + AT_ONCE]]))
        return said

    def _tests(self, data: Path | None) -> Iterable[Batch]:
        tests = self.trained.tests()
        if data is None:
            return tests
        if isinstance(tests, ImageTests):
            read = read_images(data, self.trained.options.image_size)
            return replace(tests, images=match_images(read, tests.images))
        if isinstance(tests, WholeImages):
            return replace(tests, images=read_masked_images(data))
        if isinstance(tests, TestSequences):
            return replace(tests, tokens=tests.vocabulary.encode(read_text_file(data)))
        raise _unjudged(self.trained)

    def _judge(self, inputs: Tensor, targets: Tensor) -> Iterator[Demand]:
        """Yield the demands of a batch."""
        digests = [digest_input(row) for row in inputs]
        if self.trained.kind == IMAGES:
            truths = [self.trained.classes[label] for label in targets.tolist()]
            for digest, said, truth in zip(digests, self._say(inputs), truths, strict=True):
                yield Demand(digest, said not in (truth, DECLINED), said, truth)
            return
        with torch.no_grad():
            outputs = self.trained.model(inputs)
        fails = self._failing_masks if self.trained.kind == MASKED_IMAGES else self._failing_sequences
        for digest, failed in zip(digests, fails(outputs, targets), strict=True):
            yield Demand(digest, failed)

    @torch.no_grad()
    def _say(self, images: Tensor) -> list[str]:
        sure, chosen = self.trained.model(images.to(self.trained.options.device)).softmax(1).max(1)
        names = [self.trained.classes[index] for index in chosen.tolist()]
        for sign, rows in ((DECLINED, sure < (self.criterion.sure or 0.0)), (UNDEFINED, sure.isnan())):
            names = [sign if row else name for name, row in zip(names, rows.tolist(), strict=True)]
        return names

    def _failing_masks(self, outputs: Tensor, masks: Tensor) -> list[bool]:
        assert DICE.count is not None
        shares = [DICE.count(*pair) for pair in zip(outputs, masks, strict=True)]
        fails = [float(found) < (self.criterion.dice or 0.0) * float(expected) for found, expected in shares]
        return [failed or bool(output.isnan().any()) for failed, output in zip(fails, outputs, strict=True)]

    def _failing_sequences(self, scores: Tensor, tokens: Tensor) -> list[bool]:
        losses = functional.cross_entropy(scores.transpose(1, 2), tokens, ignore_index=IGNORED, reduction="none")
        mean = losses.sum(1) / (tokens != IGNORED).sum(1)
        return [not loss <= (self.criterion.loss or 0.0) for loss in mean.tolist()]  # NaN fails


def read_network(path: Path, criterion: Criterion) -> TrainedNetwork:
    """Return the network of a run.

    Raises:
        StateError: there is no finished run.
        ConfigurationError: the criterion is not of its kind of network, or says too little.
    """
    trained = read_trained(path)
    if trained.kind not in CRITERIA:
        raise _unjudged(trained)
    wanted = CRITERIA[trained.kind]
    foreign = sorted(set(criterion.given) - {wanted})
    if foreign:
        raise ConfigurationError(f"{foreign[0]} does not judge a run of {trained.options.recipe}; give {wanted}")
    if trained.kind != IMAGES and not criterion.given:
        raise ConfigurationError(f"when a demand of a run of {trained.options.recipe} fails is open; give {wanted}")
    return TrainedNetwork(trained, criterion)


def _unjudged(trained: Trained) -> ConfigurationError:
    return ConfigurationError(
        f"demands of a run of {trained.options.recipe} are not judged here; name its weights as model, and give "
        "records with failure"
    )
