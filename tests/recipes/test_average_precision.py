from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kaisa.recipes.average_precision import (
    Matches,
    average_precision,
    box_overlaps,
    mask_overlaps,
    match,
    mean_average_precision,
)

SIDE, CLASSES = 40, 3


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    """Returns whole-numbered boxes (left, top, width, height), so that their masks are exact."""
    corners = generator.integers(0, SIDE // 2, (count, 2))
    return np.concatenate([corners, generator.integers(2, SIDE // 2, (count, 2))], 1).astype(float)


def mask_of(box: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    left, top, width, height = box.astype(int)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def random_problem(seed: int, images: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns objects, some of them crowds, and detections of which some are near objects and some share a score."""
    generator = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(1, images + 1):
        boxes = random_boxes(generator, int(generator.integers(0, 6)))
        for box in boxes:
            label, crowd = int(generator.integers(1, CLASSES + 1)), int(generator.random() < 0.2)
            objects.append({"image_id": image, "category_id": label, "box": box, "iscrowd": crowd})
            for _ in range(int(generator.integers(0, 4))):
                near = np.maximum(box + generator.integers(-2, 3, 4), [0, 0, 2, 2])
                found.append({"image_id": image, "category_id": label, "box": near})
        for box in random_boxes(generator, 2):
            found.append({"image_id": image, "category_id": int(generator.integers(1, CLASSES + 1)), "box": box})
    for one in found:
        one["score"] = float(generator.integers(1, 30) / 30)
    return objects, found


def ours(objects: list[dict[str, Any]], found: list[dict[str, Any]], kind: str, images: int) -> float:
    judged = []
    for image in range(1, images + 1):
        of_image: dict[int, Matches] = {}
        for label in range(1, CLASSES + 1):
            there, seen = (
                [one for one in ones if (one["image_id"], one["category_id"]) == (image, label)]
                for ones in (objects, found)
            )
            crowd = np.array([one["iscrowd"] for one in there], bool)
            if kind == "bbox":
                corners = [
                    np.array([[*b[:2], *(b[:2] + b[2:])] for b in (o["box"] for o in some)]) for some in (seen, there)
                ]
                overlaps = box_overlaps(*(rows.reshape(-1, 4) for rows in corners), crowd)
            else:
                masks = [np.array([mask_of(one["box"]).ravel() for one in some], bool) for some in (seen, there)]
                overlaps = mask_overlaps(*(rows.reshape(-1, SIDE * SIDE) for rows in masks), crowd)
            of_image[label] = match(overlaps, np.array([one["score"] for one in seen]), crowd)
        judged.append(of_image)
    return mean_average_precision(judged)


def of_pycocotools(objects: list[dict[str, Any]], found: list[dict[str, Any]], kind: str, images: int) -> float:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    encode = pytest.importorskip("pycocotools.mask").encode

    def told(one: dict[str, Any], number: int) -> dict[str, Any]:
        box = one["box"]
        runs = encode(np.asfortranarray(mask_of(box)))
        return {**one, "id": number, "bbox": list(box), "area": float(box[2] * box[3]), "segmentation": runs}

    known = coco.COCO()
    known.dataset = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(1, images + 1)],
        "categories": [{"id": label, "name": str(label)} for label in range(1, CLASSES + 1)],
        "annotations": [told(one, number) for number, one in enumerate(objects, 1)],
    }
    known.createIndex()
    results = coco.COCO()
    results.dataset = {**known.dataset, "annotations": [told(one, number) for number, one in enumerate(found, 1)]}
    for one in results.dataset["annotations"]:
        one["iscrowd"] = 0
    results.createIndex()
    judge = evaluation.COCOeval(known, results, kind)
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    return float(precision[precision > -1].mean())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_pycocotools_finds(seed: int, kind: str) -> None:
    objects, found = random_problem(seed, images=12)
    expected = of_pycocotools(objects, found, kind, 12)
    assert 0.05 < expected < 0.95
    assert ours(objects, found, kind, 12) == pytest.approx(expected, abs=1e-12)


def test_only_the_best_hundred_detections_of_an_image_count_as_in_pycocotools() -> None:
    objects, found = random_problem(7, images=2)
    one = objects[0]
    better = [{**one, "box": np.array([30.0, 30, 2, 2]), "score": 1.0} for _ in range(99)]
    expected = of_pycocotools(objects, [*better, *found], "bbox", 2)
    assert ours(objects, [*better, *found], "bbox", 2) == pytest.approx(expected, abs=1e-12)


def test_all_right_is_one_and_all_wrong_is_nothing() -> None:
    no_crowd = np.zeros(2, bool)
    right = match(np.eye(2), np.array([0.5, 0.9]), no_crowd)
    wrong = match(np.zeros((2, 2)), np.array([0.5, 0.9]), no_crowd)
    assert average_precision([right]) == pytest.approx(1)
    assert average_precision([wrong]) == 0


def test_a_second_detection_of_the_same_object_is_wrong() -> None:
    twice = match(np.array([[0.99], [1.0]]), np.array([0.9, 0.8]), np.zeros(1, bool))
    assert twice.right.tolist() == [[True, False]] * 10


def test_what_lies_in_a_crowd_counts_for_nothing() -> None:
    crowd = match(np.ones((3, 1)), np.array([0.9, 0.8, 0.7]), np.ones(1, bool))
    assert crowd.ignored.all()
    assert crowd.expected == 0
    assert math.isnan(mean_average_precision([{1: crowd}]))


def test_a_class_of_which_there_are_no_objects_does_not_count() -> None:
    found = match(np.eye(1), np.array([0.9]), np.zeros(1, bool))
    invented = match(np.zeros((1, 0)), np.array([0.9]), np.zeros(0, bool))
    assert mean_average_precision([{1: found, 2: invented}]) == pytest.approx(1)
    missed = match(np.zeros((0, 1)), np.zeros(0), np.zeros(1, bool))
    assert mean_average_precision([{1: found, 2: missed}]) == pytest.approx(0.5)
