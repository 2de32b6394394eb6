"""One head on feature maps of several sizes, and another on as many regions as are found: as detectors have them.

What one image adds to a factor is the sum over everything that was computed of it: positions of all maps, and regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import kaisa
from tests.support.canonical import canonical_gradient, canonical_input, gradient_matrix
from tests.support.kron import tikhonov_solve
from tests.support.recording import Recorded, recording
from tests.support.settings import DAMPING, EVERY_STEP

IMAGES = 3
LAYERS = ["fine", "coarse", "shared", "region", "box"]

Found = Sequence[Sequence[int]]
"""For each image and each of its regions the number of a place."""


class Detector(nn.Module):
    """A pyramid of two feature maps, a head that passes over both, and one for regions that are cut out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.shared = nn.Conv2d(3, 2, 3, padding=1)
        self.region = nn.Linear(12, 4)
        self.box = nn.Linear(4, 2)

    def forward(self, images: Tensor | list[Tensor], found: Found) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the shared head for each map, and those of the other for each region."""
        x = torch.stack(images) if isinstance(images, list) else images
        fine = torch.tanh(self.fine(x))
        coarse = torch.tanh(self.coarse(fine))
        patches = [part.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5) for part in (fine, coarse)]
        places = torch.cat([part.reshape(len(x), -1, 12) for part in patches], dim=1)
        regions = torch.cat([places[image, list(numbers)] for image, numbers in enumerate(found)])
        return [self.shared(fine), self.shared(coarse)], self.box(torch.tanh(self.region(regions)))


def loss_of(outputs: tuple[list[Tensor], Tensor]) -> Tensor:
    """Return the mean over images of what their positions and regions cost."""
    maps, boxes = outputs
    return (sum((part - 0.3).square().sum() for part in maps) + (boxes - 0.5).square().sum()) / IMAGES


@pytest.fixture
def model() -> Detector:
    return Detector().double()


def draw_images() -> Tensor:
    return torch.randn(IMAGES, 2, 8, 8, dtype=torch.float64)


def brute_force(record: Recorded, images: int) -> tuple[Tensor, Tensor]:
    """Return A, the mean over all rows, and G, the mean over images of the sums over rows, of a mean loss."""
    rows = [canonical_input(record.module, x).flatten(0, 2) for x in record.inputs]
    deltas = [images * canonical_gradient(record.module, d).flatten(0, 2) for d in record.gradients]
    a = sum(torch.outer(row, row) for part in rows for row in part) / sum(map(len, rows))
    g = sum(torch.outer(delta, delta) for part in deltas for delta in part) / images
    return a, g


REGIONS: dict[str, Found] = {
    "as many of each image": [[0, 4], [1, 9], [8, 2]],
    "more of some than of others": [[3], [1, 2, 3, 4, 9, 9, 0], [5, 6]],
    "none of one": [[], [7, 9], [0]],
    "one in all": [[], [], [9]],
}


@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("found", REGIONS.values(), ids=REGIONS)
def test_factors_are_those_of_all_positions_and_regions(model: Detector, found: Found, listed: bool) -> None:
    images = draw_images()
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    with recording(model, LAYERS) as records:
        loss_of(model(list(images) if listed else images, found)).backward()
    raw = {name: gradient_matrix(model.get_submodule(name))[0].clone() for name in LAYERS}
    kfac.step()
    assert [len(records[name].inputs) for name in LAYERS] == [1, 1, 2, 1, 1]
    for name in LAYERS:
        a, g = brute_force(records[name], IMAGES)
        torch.testing.assert_close(kfac.factors[name].a, a)
        torch.testing.assert_close(kfac.factors[name].g, g)
        solved = tikhonov_solve(a, g, raw[name], DAMPING)
        torch.testing.assert_close(gradient_matrix(model.get_submodule(name))[0], solved)


def test_backward_passes_with_different_numbers_of_regions_add_up(model: Detector) -> None:
    passes = list(REGIONS.values())
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP, accumulation_steps=len(passes))
    with recording(model, LAYERS) as records:
        for found in passes:
            (loss_of(model(draw_images(), found)) / len(passes)).backward()
    kfac.step()
    for name in LAYERS:
        a, g = brute_force(records[name], IMAGES * len(passes))
        torch.testing.assert_close(kfac.factors[name].a, a)
        torch.testing.assert_close(kfac.factors[name].g, g)


def test_the_average_over_steps_does_not_mind_how_many_regions_each_had(model: Detector) -> None:
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP, factor_decay=0.5)
    pairs = []
    for found in REGIONS.values():
        model.zero_grad()
        with recording(model, LAYERS) as records:
            loss_of(model(draw_images(), found)).backward()
        pairs.append(brute_force(records["region"], IMAGES))
        kfac.step()
    weights = [0.5 ** (len(pairs) - number) for number in range(len(pairs))]
    for side, factor in enumerate(kfac.factors["region"]):
        expected = sum(weight * pair[side] for weight, pair in zip(weights, pairs, strict=True)) / sum(weights)
        torch.testing.assert_close(factor, expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_detector_with_a_shared_head_learns_behind_kfac(model: Detector, sharing: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {**EVERY_STEP, "damping": 0.1, "kl_clip": 0.01, "sharing": sharing, "lr": None}
    kfac = kaisa.KFACPreconditioner(model, optimizer, **options)
    images = draw_images()
    losses = []
    for found in [*REGIONS.values()] * 8:
        optimizer.zero_grad()
        loss = loss_of(model(images, found))
        loss.backward()
        kfac.step()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-len(REGIONS) :]) < 0.3 * sum(losses[: len(REGIONS)])
