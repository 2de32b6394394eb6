from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kaisa.errors import DataError
from kaisa.recipes.images import (
    AHEAD,
    Images,
    decode_ahead,
    find_test_data,
    hold_out,
    is_image,
    match_images,
    open_tree,
    read_images,
)
from tests.recipes.conftest import CLASSES, write_images, zip_folder


def equal(left: Images, right: Images) -> bool:
    return (
        left.classes == right.classes
        and torch.equal(left.labels, right.labels)
        and torch.equal(left.pixels, right.pixels)
    )


def test_pixels_and_labels_are_those_of_the_files(folder: Path) -> None:
    images = read_images(folder)
    assert images.classes == ("cat", "dog", "eel")
    assert images.labels.tolist() == [0] * 7 + [1] * 9 + [2] * 8
    assert images.shape == (3, 8, 8)
    expected = np.asarray(Image.open(folder / "dog" / "0002.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(images.pixels[7 + 2].numpy(), expected)


@pytest.mark.parametrize("inside", ["", "animals/", "data/animals/"])
def test_a_zip_file_gives_what_its_folder_gives(folder: Path, tmp_path: Path, inside: str) -> None:
    archive = zip_folder(folder, tmp_path / "animals.zip", inside)
    assert equal(read_images(archive), read_images(folder))


def test_what_is_no_image_and_what_is_hidden_is_left_out(folder: Path) -> None:
    expected = read_images(folder)
    (folder / "readme.txt").write_text("three animals")
    (folder / "cat" / "notes.txt").write_text("seven cats")
    (folder / "cat" / ".0000.png").write_text("no image")
    (folder / ".cache").mkdir()
    assert equal(read_images(folder), expected)


def test_grey_images_have_one_channel_unless_one_has_colour(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "animals")
    for file in folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    grey = read_images(folder)
    assert grey.shape == (1, 8, 8)
    Image.new("RGB", (8, 8), "red").save(folder / "eel" / "0007.png")
    mixed = read_images(folder)
    assert mixed.shape == (3, 8, 8)
    assert torch.equal(mixed.pixels[:-1], grey.pixels[:-1].expand(-1, 3, -1, -1))


def test_images_are_resized_where_asked(folder: Path) -> None:
    assert read_images(folder, side=5).shape == (3, 5, 5)
    assert equal(read_images(folder, side=8), read_images(folder))


@pytest.mark.parametrize("zipped", [False, True])
def test_however_many_threads_decode_the_images_are_the_same(zipped: bool, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "animals", {"cat": 150, "dog": 150}, side=3)
    Image.new("L", (3, 3)).save(folder / "cat" / "0000.png")
    path = zip_folder(folder, tmp_path / "animals.zip") if zipped else folder
    alone, told = read_images(path, workers=1), []
    together = read_images(path, progress=lambda *counts: told.append(counts), workers=7)
    assert equal(alone, together)
    assert told == [(index + 1, 300) for index in range(300)]
    expected = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.rglob("*.png"))])
    np.testing.assert_array_equal(together.pixels.numpy(), expected.transpose(0, 3, 1, 2))


def test_images_are_held_once_while_they_are_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "animals", {"cat": 20, "dog": 20}, side=100)
    read_images(folder)  # imports
    tracemalloc.start()
    images = read_images(folder, workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * images.pixels.numel()


def test_threads_decode_but_a_few_images_ahead(folder: Path) -> None:
    with open_tree(folder) as tree:
        names = [name for name in tree.names if is_image(name)]
        begun: list[str] = []
        tree.read = lambda name: begun.append(name) or (folder / name).read_bytes()  # type: ignore[func-returns-value]
        decoded = decode_ahead(tree, folder, names, workers=2)
        next(decoded)
        decoded.close()  # waits for the threads
    assert len(begun) == 2 * AHEAD + 1 < len(names)


def test_progress_counts_to_the_end(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    read_images(folder, progress=lambda done, total: told.append((done, total)))
    assert told == [(index + 1, 24) for index in range(24)]


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder or zip file: .*nowhere"):
        read_images(tmp_path / "nowhere")


def test_a_file_that_is_no_zip_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no images")
    with pytest.raises(DataError, match="neither a folder nor a zip file"):
        read_images(tmp_path / "text")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_class_folder_without_images_is_refused(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "fox").mkdir()
    path = zip_folder(folder, tmp_path / "animals.zip") if zipped else folder
    with pytest.raises(DataError, match="class folder without images: fox in"):
        read_images(path)


@pytest.mark.parametrize("classes", [{}, {"cat": 3}])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, classes: dict[str, int]) -> None:
    folder = tmp_path / "animals"
    folder.mkdir()
    write_images(folder, classes)
    with pytest.raises(DataError, match=f"found {len(classes)} class folders"):
        read_images(folder)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named(folder: Path, damage: bytes | None) -> None:
    file = folder / "dog" / "0003.png"
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(DataError, match=r"unreadable image: .*animals/dog/0003\.png"):
        read_images(folder)


@pytest.mark.parametrize(
    ("kind", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
def test_an_image_of_more_shades_than_a_byte_has_is_named(kind: type, suffix: str, folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 300, kind)).save(folder / "eel" / f"0004.{suffix}")
    with pytest.raises(DataError, match=rf"eel/0004\.{suffix} has more than 8 bits a pixel .*; convert it to 8 bits"):
        read_images(folder)


def test_an_image_of_another_size_is_named(folder: Path) -> None:
    Image.new("RGB", (8, 5)).save(folder / "eel" / "0004.png")
    with pytest.raises(DataError, match=r"eel/0004\.png is 8x5 pixels, the first image 8x8"):
        read_images(folder)


def test_holding_out_takes_a_share_of_each_class_and_loses_none(images: Images) -> None:
    kept, held = hold_out(images, 0.25, seed=1)
    assert held.labels.bincount().tolist() == [round(0.25 * count) for count in CLASSES.values()]
    both = torch.cat([kept.pixels, held.pixels]).flatten(1)
    assert sorted(both.tolist()) == sorted(images.pixels.flatten(1).tolist())


def test_holding_out_depends_on_the_seed_alone(images: Images) -> None:
    first, again, other = (hold_out(images, 0.25, seed)[1] for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    images = read_images(write_images(tmp_path / "animals", {"cat": 3, "dog": 1}))
    with pytest.raises(DataError, match="class dog has one image"):
        hold_out(images, 0.2, seed=0)


def test_test_images_get_the_labels_of_the_training_images(images: Images, tmp_path: Path) -> None:
    test = read_images(write_images(tmp_path / "test", {"eel": 2, "cat": 1}))
    matched = match_images(test, images)
    assert matched.classes == images.classes
    assert matched.labels.tolist() == [0, 2, 2]


def test_test_images_of_unknown_class_or_other_size_are_refused(images: Images, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a class that the training images lack: fox"):
        match_images(read_images(write_images(tmp_path / "a", {"cat": 1, "fox": 1})), images)
    with pytest.raises(DataError, match=r"test images are \(3, 6, 6\)"):
        match_images(read_images(write_images(tmp_path / "b", side=6)), images)


def test_test_data_are_found_beside_training_data(tmp_path: Path) -> None:
    train = tmp_path / "animals-train.zip"
    assert find_test_data(train) is None
    (tmp_path / "animals-test.zip").touch()
    assert find_test_data(train) == tmp_path / "animals-test.zip"
    assert find_test_data(tmp_path / "animals-test.zip") is None


def test_real_photographs_are_read_in_place(real_data: Path) -> None:
    images = read_images(real_data / "cifar10-test.zip")
    assert images.pixels.shape == (10_000, 3, 32, 32)
    assert images.labels.bincount().tolist() == [1000] * 10
    assert images.classes[0] == "airplane"
