"""Scenes are what COCO's files say, batches of them are drawn by seed, and what is not as it should be is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kaisa.cli import BAD_INPUT, run
from kaisa.errors import DataError
from kaisa.recipes.detection import SceneBatches, SceneTests, mirror, read
from kaisa.recipes.scenes import BOXES, CROWD, LABELS, MASKS, Scenes, mask_of, read_scenes
from tests.recipes.conftest import write_images, write_shapes, zip_folder


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


@pytest.fixture
def scenes(shapes: Path) -> Scenes:
    return read_scenes(shapes)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "annotations.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return folder


def test_labels_are_those_of_the_categories_in_the_order_of_their_ids(scenes: Scenes) -> None:
    assert scenes.classes == ("square", "disc")
    assert scenes.labels == {3: 1, 7: 2}


def test_a_mask_covers_its_object_and_the_box_lies_around_it(scenes: Scenes) -> None:
    for row in range(len(scenes)):
        image, objects = scenes.image(row), scenes.objects(row)
        colour = image.float() - image.float().mean(0)
        for box, label, mask in zip(objects[BOXES], objects[LABELS], objects[MASKS], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()
            assert colour[2 if label == 1 else 0][mask.bool()].mean() > 40  # squares are blue, discs are red


def test_a_zip_file_is_read_as_the_folder_is(shapes: Path, scenes: Scenes, tmp_path: Path) -> None:
    zipped = read_scenes(zip_folder(shapes, tmp_path / "shapes.zip", inside="shapes/"))
    assert torch.equal(zipped.image(3), scenes.image(3))
    assert all(torch.equal(zipped.objects(3)[name], scenes.objects(3)[name]) for name in scenes.objects(3))


def test_runs_that_are_written_as_text_are_those_of_pycocotools() -> None:
    coder = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    generator = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        mask = (generator.random((37, 90)) < share).astype(np.uint8)
        runs = coder.encode(np.asfortranarray(mask))
        found = mask_of({"size": runs["size"], "counts": runs["counts"].decode()}, 37, 90)
        np.testing.assert_array_equal(found, mask)


def test_mirroring_twice_changes_nothing_and_once_keeps_boxes_around_masks(scenes: Scenes) -> None:
    image, objects = read(scenes, 0)
    once = mirror(image, objects)
    twice = mirror(*once)
    assert torch.equal(twice[0], image)
    assert all(torch.equal(twice[1][name], objects[name]) for name in objects)
    for box, mask in zip(once[1][BOXES], once[1][MASKS], strict=True):
        columns = mask.nonzero()[:, 1]
        assert [columns.min(), columns.max() + 1] == box[::2].tolist()


def test_ranks_divide_the_batches_of_one(scenes: Scenes) -> None:
    whole = list(SceneBatches(scenes, 4, True, seed=5).epoch(2))
    parts = [list(SceneBatches(scenes, 4, True, seed=5, rank=rank, ranks=2).epoch(2)) for rank in range(2)]
    assert len(whole) == 2
    for (shown, rows), (left, rows_left), (right, rows_right) in zip(whole, *parts, strict=True):
        assert rows.tolist() == [*rows_left.tolist(), *rows_right.tolist()]
        for image, part in zip(shown[0], [*left[0], *right[0]], strict=True):
            assert torch.equal(image, part)


def test_however_many_threads_read_ahead_the_batches_are_the_same(scenes: Scenes) -> None:
    one, many = (list(SceneBatches(scenes, 4, True, seed=5, workers=workers).epoch(0)) for workers in (1, 7))
    for (shown, rows), (others, other_rows) in zip(one, many, strict=True):
        assert torch.equal(rows, other_rows)
        assert all(torch.equal(*pair) for pair in zip(shown[0], others[0], strict=True))
        for left, right in zip(shown[1], others[1], strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_epochs_differ_and_come_again_by_seed(scenes: Scenes) -> None:
    def numbers(epoch: int) -> list[int]:
        return torch.cat([rows for _, rows in SceneBatches(scenes, 4, True, seed=5).epoch(epoch)]).tolist()

    assert numbers(0) == numbers(0)
    assert numbers(0) != numbers(1)
    assert sorted(numbers(0)) == list(range(8))


def test_all_that_is_tested_on_is_one_batch_that_is_read_image_by_image(scenes: Scenes) -> None:
    ((images, objects), rows) = next(iter(SceneTests(scenes)))
    assert rows.tolist() == list(range(8))
    assert [image.shape for image in images[:2]] == [(3, 40, 32), (3, 32, 40)]
    assert sum(1 for _ in images) == sum(1 for _ in objects) == 8


def test_crowds_are_told_and_images_with_nothing_else_are_not_learned_from(shapes: Path) -> None:
    def crowd(value: dict[str, Any]) -> None:
        for one in value["annotations"]:
            one["iscrowd"] = int(one["image_id"] == 1)

    scenes = read_scenes(change(shapes, crowd))
    assert scenes.objects(0)[CROWD].tolist() == [True, True]
    assert len(scenes.with_objects()) == 7


def test_boxes_without_a_side_are_left_out(shapes: Path) -> None:
    scenes = read_scenes(change(shapes, lambda value: value["annotations"][0]["bbox"].__setitem__(2, 0)))
    assert len(scenes.objects(0)[BOXES]) == 1


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an image that is not there": (
        lambda value: value["images"][2].update(file_name="gone.png"),
        "gone.png, of which there are annotations, is not in",
    ),
    "an unknown category": (
        lambda value: value["annotations"][0].update(category_id=4),
        "annotation 1 in .* is of an image or a category that is not listed",
    ),
    "no list of images": (lambda value: value.pop("images"), "is not in the format of COCO: KeyError 'images'"),
    "no images": (lambda value: value.update(images=[], annotations=[]), "has no images"),
}


@pytest.mark.parametrize(("edit", "message"), BAD.values(), ids=BAD)
def test_bad_annotations_are_refused(edit: Callable[[dict[str, Any]], None], message: str, shapes: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_scenes(change(shapes, edit))


def test_an_image_of_another_size_and_a_mask_of_another_size_are_refused(shapes: Path) -> None:
    scenes = read_scenes(change(shapes, lambda value: value["images"][0].update(height=41)))
    with pytest.raises(DataError, match="is 32x40 pixels, its annotation says 32x41"):
        scenes.image(0)
    with pytest.raises(DataError, match="a mask has 10 pixels, its image 12"):
        mask_of({"size": [3, 4], "counts": [4, 6]}, 3, 4)
    with pytest.raises(DataError, match="a segmentation is neither polygons nor runs"):
        mask_of([[1, 2, 3]], 3, 4)


REFUSED = {
    "no annotations": (
        ["--data", "images", "--model", "smallest"],
        "found 0 files of annotations in images; give one annotations.json",
    ),
    "no torchvision": (
        ["--data", "shapes"],
        "the recipe maskrcnn needs torchvision, which is not installed; pip install 'kaisa[detection]'",
    ),
    "an unknown part": (
        ["--data", "shapes", "--model", "smallest", "--parts", "neck"],
        "the model has no part 'neck'; choose from backbone, detector, roi_heads, rpn",
    ),
    "too few images": (
        ["--data", "shapes", "--model", "smallest", "--batch-size", "9"],
        "batch-size is 9, but there are 6 images with objects to learn from",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_recipe_cannot_do_is_refused_before_anything_is_written(
    options: list[str],
    message: str,
    shapes: Path,
    smallest_detector: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shapes.parent)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    write_images(shapes.parent / "images")
    assert run(["train", "--recipe", "maskrcnn", *options]) == BAD_INPUT
    assert message in capfd.readouterr().err
    assert not Path("runs").exists()
