from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kaisa.errors import DataError
from kaisa.recipes.batches import Normalizer
from kaisa.recipes.crops import Crops, WholeImages, crop, turn
from kaisa.recipes.masks import MaskedImages, read_masked_images, split_masked_images
from tests.recipes.conftest import write_discs, zip_folder


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    return write_discs(tmp_path / "discs")


@pytest.fixture
def images(discs: Path) -> MaskedImages:
    return read_masked_images(discs)


@pytest.fixture
def numbered() -> MaskedImages:
    """Images each pixel of which tells its own place; the mask is bright where the last bit is set."""
    pixels = torch.arange(2 * 12 * 10).reshape(2, 1, 12, 10).to(torch.uint8)
    return MaskedImages(pixels, pixels[:, 0] % 2)


def test_images_and_masks_are_those_of_the_files(discs: Path, images: MaskedImages) -> None:
    assert images.shape == (1, 32, 48)
    assert len(images) == 5
    pixels = np.asarray(Image.open(discs / "image" / "03.png"))
    mask = np.asarray(Image.open(discs / "label" / "03.png"))
    np.testing.assert_array_equal(images.pixels[3, 0].numpy(), pixels)
    np.testing.assert_array_equal(images.masks[3].numpy(), mask > 127)


@pytest.mark.parametrize("inside", ["", "data/discs/"])
def test_a_zip_file_gives_what_its_folder_gives(discs: Path, tmp_path: Path, inside: str, images: MaskedImages) -> None:
    found = read_masked_images(zip_folder(discs, tmp_path / "discs.zip", inside))
    assert torch.equal(found.pixels, images.pixels)
    assert torch.equal(found.masks, images.masks)


def test_however_many_threads_decode_images_and_masks_are_the_same(discs: Path, images: MaskedImages) -> None:
    for workers in (1, 3):
        found = read_masked_images(discs, workers=workers)
        assert torch.equal(found.pixels, images.pixels)
        assert torch.equal(found.masks, images.masks)


def test_masks_of_another_size_than_the_images_are_refused(discs: Path) -> None:
    for file in (discs / "label").glob("*.png"):
        Image.new("L", (32, 48)).save(file)
    with pytest.raises(DataError, match=r"label/00\.png is 32x48 pixels, the first image 48x32; make them equal"):
        read_masked_images(discs)


def test_images_without_a_partner_are_named(discs: Path) -> None:
    (discs / "label" / "02.png").unlink()
    with pytest.raises(DataError, match=r"image/02\.png in .* has no mask of the same name"):
        read_masked_images(discs)
    (discs / "image" / "02.png").unlink()
    (discs / "image" / "04.png").unlink()
    with pytest.raises(DataError, match=r"label/04\.png in .* has no image of the same name"):
        read_masked_images(discs)


def test_a_folder_without_pairs_and_other_sizes_are_refused(discs: Path, tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(discs / "label" / "01.png")
    with pytest.raises(DataError, match=r"label/01\.png is 9x9 pixels, the first image 48x32"):
        read_masked_images(discs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images with masks in .*empty; give them as image/NAME"):
        read_masked_images(tmp_path / "empty")


def test_masks_that_are_dim_everywhere_are_refused_and_black_ones_read(discs: Path) -> None:
    for file in (discs / "label").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 255).save(file)
    with pytest.raises(DataError, match=r"no mask in .*discs is bright anywhere: their pixels go up to 1, .*; draw it"):
        read_masked_images(discs)
    for file in (discs / "label").glob("*.png"):
        Image.new("L", (48, 32)).save(file)
    assert not read_masked_images(discs).masks.any()


def test_a_share_is_held_out_by_seed_and_nothing_is_lost(images: MaskedImages) -> None:
    kept, held = split_masked_images(images, 0.4, seed=1)
    assert (len(kept), len(held)) == (3, 2)
    both = torch.cat([kept.pixels, held.pixels]).flatten(1).tolist()
    assert sorted(both) == sorted(images.pixels.flatten(1).tolist())
    assert torch.equal(split_masked_images(images, 0.4, seed=1)[1].pixels, held.pixels)
    with pytest.raises(DataError, match="there is one image"):
        split_masked_images(images.select(torch.tensor([0])), 0.2, seed=0)


def test_a_crop_is_a_square_of_the_image_with_its_mask(numbered: MaskedImages) -> None:
    rows = torch.arange(60) % 2
    pixels, masks = crop(numbered, rows, 4, torch.Generator().manual_seed(2))
    assert pixels.shape == (60, 1, 4, 4)
    assert torch.equal(masks, pixels[:, 0] % 2)
    corners = pixels[:, 0, 0, 0].int() - 120 * rows
    expected = torch.arange(4)[:, None] * 10 + torch.arange(4)
    assert all(torch.equal(p[0] - p[0, 0, 0], expected) for p in pixels.int())
    assert set((corners // 10).tolist()) <= set(range(9))
    assert set((corners % 10).tolist()) <= set(range(7))
    assert len(set(corners.tolist())) > 20


def test_crops_are_turned_together_with_their_masks_in_eight_ways(numbered: MaskedImages) -> None:
    pixels = numbered.pixels[:1, :, :4, :4].expand(80, -1, -1, -1)
    turned, masks = turn(pixels, pixels[:, 0] % 2, torch.Generator().manual_seed(2))
    assert torch.equal(masks, turned[:, 0] % 2)
    square = pixels[0, 0].numpy()
    expected = {np.rot90(side, k).tobytes() for side in (square, square.T) for k in range(4)}
    assert {crop[0].numpy().tobytes() for crop in turned} == expected


def test_an_epoch_of_crops_is_a_function_of_seed_and_number_and_ranks_share_it(images: MaskedImages) -> None:
    def epoch(number: int, seed: int = 3, rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        crops = Crops(images, Normalizer.fit(images), 16, 4, True, seed, rank=rank, ranks=ranks)
        assert len(crops) == 5 * 2 * 3 // 4
        assert crops.terms == 4 // ranks * 16 * 16
        inputs, masks = zip(*crops.epoch(number), strict=True)
        return torch.stack(inputs), torch.stack(masks)

    inputs, masks = epoch(2)
    assert all(torch.equal(x, y) for x, y in zip(epoch(2), (inputs, masks), strict=True))
    assert not torch.equal(epoch(1)[0], inputs)
    assert not torch.equal(epoch(2, seed=4)[0], inputs)
    halves = [epoch(2, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat([half[0] for half in halves], 1), inputs)
    assert torch.equal(torch.cat([half[1] for half in halves], 1), masks)


def test_whole_images_are_cut_to_what_the_network_can_halve(images: MaskedImages) -> None:
    tests = list(WholeImages(images, Normalizer.fit(images), 10))
    assert [(x.shape, y.shape) for x, y in tests] == [((1, 1, 30, 40), (1, 30, 40))] * 5
    assert torch.equal(tests[4][1][0], images.masks[4, :30, :40].float())


def test_the_micrographs_are_read(real_data: Path) -> None:
    images = read_masked_images(real_data / "isbi2012-membrane.zip")
    assert (len(images), images.shape) == (30, (1, 512, 512))
    assert 0.7 < images.masks.float().mean().item() < 0.85
