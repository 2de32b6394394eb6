from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kaisa.recipes.batches import BORDER, ImageBatches, Normalizer, mirror, shift
from kaisa.recipes.images import Images


def collect(batches: ImageBatches, epoch: int) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in batches.epoch(epoch)])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_an_epoch_is_a_function_of_seed_and_number(batches: ImageBatches) -> None:
    assert torch.equal(collect(batches, 2), collect(replace(batches), 2))
    assert not torch.equal(collect(batches, 2), collect(batches, 3))
    assert not torch.equal(collect(batches, 2), collect(replace(batches, seed=4), 2))


def test_the_global_generator_has_no_part_in_it(batches: ImageBatches) -> None:
    torch.manual_seed(1)
    expected, state = collect(batches, 0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(collect(batches, 0), expected)
    torch.manual_seed(1)
    collect(batches, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_shows_each_image_once_with_its_label(images: Images) -> None:
    plain = ImageBatches(images, Normalizer.fit(images), size=8, augment=False, seed=0)
    assert len(plain) == 3
    inputs = collect(plain, 0)
    labels = torch.cat([labels for _, labels in plain.epoch(0)])
    expected = plain.normalize(images.pixels)
    rows = [int((expected == row).flatten(1).all(1).nonzero()) for row in inputs]
    assert sorted(rows) == list(range(24))
    assert torch.equal(labels, images.labels[rows])


def test_what_fills_no_batch_is_left_for_other_epochs(images: Images) -> None:
    batches = ImageBatches(images, Normalizer.fit(images), size=10, augment=False, seed=0)
    assert [len(labels) for _, labels in batches.epoch(0)] == [10, 10]


def test_normalizing_gives_mean_zero_and_deviation_one(images: Images) -> None:
    pixels = images.pixels.double().numpy()
    normalizer = Normalizer.fit(images)
    np.testing.assert_allclose(normalizer.mean.flatten(), pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(normalizer.deviation.flatten(), pixels.std((0, 2, 3)), rtol=1e-6)
    black = replace(images, pixels=torch.zeros_like(images.pixels))
    assert torch.equal(Normalizer.fit(black)(black.pixels), torch.zeros(images.pixels.shape))


def test_a_shifted_image_is_the_image_moved_over_black(images: Images, generator: torch.Generator) -> None:
    pixels = images.pixels
    moves = set()
    for before, after in zip(pixels, shift(pixels, generator), strict=True):
        padded = np.pad(before.numpy(), ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
        found = [
            (down, right)
            for down in range(2 * BORDER + 1)
            for right in range(2 * BORDER + 1)
            if np.array_equal(padded[:, down : down + 8, right : right + 8], after.numpy())
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 12


def test_about_half_of_the_images_are_mirrored(images: Images, generator: torch.Generator) -> None:
    mirrored = mirror(images.pixels, generator)
    same = (mirrored == images.pixels).flatten(1).all(1)
    swapped = (mirrored == images.pixels.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~swapped)
    assert 6 <= int(same.sum()) <= 18
