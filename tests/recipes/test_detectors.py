"""A detector's losses and finds become what a lesson needs; K-FAC takes the parts that are asked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import DETECTORS, find_model
from kaisa.recipes.contestants import Contestant, Preconditioning, outside
from kaisa.recipes.data import read_data
from kaisa.recipes.detectors import REGIONS, Detector
from kaisa.recipes.loop import Training, evaluate
from kaisa.recipes.options import Options
from kaisa.recipes.tasks import Lesson
from tests.recipes.conftest import write_shapes
from tests.support.detector import TinyDetector


def lesson_of(folder: Path, **given: object) -> Lesson:
    options = Options.complete(
        {"recipe": "maskrcnn", "model": "smallest", "data": str(folder), "epochs": 6, "lr": 0.1, **given}
    )
    return read_data(options).lesson(options, 0)


@pytest.fixture
def lesson(tmp_path: Path, smallest_detector: None) -> Lesson:
    return lesson_of(write_shapes(tmp_path / "shapes", 20))


def train(lesson: Lesson, preconditioning: Preconditioning | None) -> Training:
    training = Training.start(Contestant("sgd", 0.1, preconditioning=preconditioning), lesson, 6)
    while not training.is_finished:
        training.epoch()
    training.close()
    return training


def test_the_heads_behind_kfac_learn_to_find_shapes(lesson: Lesson) -> None:
    behind = train(lesson, Preconditioning(factor_update_steps=2, inv_update_steps=5, parts="roi_heads")).history
    plain = train(lesson, None).history
    for history in (plain, behind):
        assert history[-1].test_loss < 0.6 * history[0].test_loss
        assert max(epoch.test_score for epoch in history) > 0.1
        assert max(epoch.further["mask mAP"] for epoch in history) > 0.05
    assert behind[-1].train_loss < plain[-1].train_loss


def test_evaluation_changes_neither_statistics_nor_the_source_of_what_is_random(lesson: Lesson) -> None:
    model = lesson.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (evaluate(model, lesson).means() for _ in range(2))
    assert str(first) == str(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_perfect_detector_has_a_precision_of_one(lesson: Lesson) -> None:
    known = [objects for _, objects in zip(*next(iter(lesson.tests))[0], strict=True)]

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.asked = 0

        def forward(self, images: list[torch.Tensor], targets: object = None) -> object:
            if targets is not None:
                return {"loss": self.scale.square()}
            objects, self.asked = known[self.asked], self.asked + 1
            masks = objects["masks"][:, None].float() * 0.8
            return [{**objects, "masks": masks, "scores": torch.rand(len(masks))}]

    loss, scores = evaluate(Detector(Oracle()), lesson).means()
    assert loss == 1
    assert scores == pytest.approx([1, 1])


def test_terms_of_the_loss_are_the_regions_of_a_batch(lesson: Lesson) -> None:
    assert lesson.batches.terms == 4 * REGIONS


PARTS = {
    "roi_heads": {"roi_heads"},
    "rpn, backbone": {"rpn", "backbone"},
    None: {"backbone", "rpn", "roi_heads"},
    "detector": {"backbone", "rpn", "roi_heads"},
}


@pytest.mark.parametrize("parts", PARTS)
def test_the_parts_that_are_asked_for_are_preconditioned_alone(parts: str | None) -> None:
    model = Detector(TinyDetector(2))
    contestant = Contestant("sgd", 0.1, preconditioning=Preconditioning(parts=parts))
    kfac = contestant.build_preconditioner(model, contestant.build_optimizer(model), 0)
    assert kfac is not None
    assert {row.name.split(".")[1] for row in kfac.coverage() if row.covered} == PARTS[parts]


def test_an_unknown_part_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match="no part 'head'; choose from backbone, detector, roi_heads, rpn"):
        outside(Detector(TinyDetector(2)), "head")


def test_the_recipe_takes_the_heads_unless_told_otherwise() -> None:
    options = Options.complete({"recipe": "maskrcnn", "data": "somewhere"})
    assert options.preconditioning.parts == "roi_heads"
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize("name", [name for name in DETECTORS if name.startswith("maskrcnn")])
def test_kfac_takes_the_heads_of_torchvisions_mask_rcnn(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: there is no build of it for every machine")
    folder = write_shapes(tmp_path / "shapes", 5)
    lesson = lesson_of(folder, model=name, image_size=64, batch_size=2)
    model = lesson.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    skipped = outside(model, "roi_heads")
    kfac = kaisa.KFACPreconditioner(
        model,
        optimizer,
        factor_update_steps=1,
        inv_update_steps=10,
        skip_layers=skipped,
        loss_terms=lesson.batches.terms,
    )
    assert {row.name.split(".")[1] for row in kfac.coverage() if row.covered} == {"roi_heads"}
    scenes, rows = next(lesson.batches.epoch(0))
    for _ in range(3):
        optimizer.zero_grad()
        loss = lesson.task.loss(model(scenes), rows)
        loss.backward()
        raw = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        kfac.step()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter.grad, raw[name])}
        assert {name.split(".")[1] for name in changed} == {"roi_heads"}
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
    loss, scores = evaluate(model, lesson).means()
    assert loss > 0
    assert all(0 <= score <= 1 for score in scores)


def test_every_detector_has_a_name() -> None:
    assert find_model("maskrcnn", "maskrcnn-resnet50") is DETECTORS["maskrcnn-resnet50"]
