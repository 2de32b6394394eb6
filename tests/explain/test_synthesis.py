"""The global methods through the front door."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Explanation, Priors, explain

SHAPE = (2, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(20, 3)).train()


def made(model: nn.Module, method: str, inputs: Any = None, target: Any = None, **options: Any) -> Explanation:
    return explain(model, inputs, method, target, **{"steps": 3, **options})


@pytest.mark.parametrize(
    ("method", "target", "options", "count"),
    [
        ("filter", None, {"layer": "0", "channels": [0, 3]}, 2),
        ("filter", None, {}, 4),
        ("layer", None, {"layer": "2"}, 1),
        ("logit", [0, 2], {}, 2),
        ("logit", 1, {"fourier": False, "priors": Priors(total_variation=0.1)}, 1),
    ],
)
def test_pictures_are_made_of_nothing_but_a_shape(
    model: nn.Module, method: str, target: Any, options: dict[str, Any], count: int
) -> None:
    explanation = made(model, method, None, target, input_shape=SHAPE, low=-1.0, high=[1.0, 2.0], **options)
    assert explanation.kind == "picture"
    assert explanation.values.shape == (count, *SHAPE)
    assert explanation.details["trace"].shape == (count, 4)
    assert explanation.values.min() >= -1
    assert explanation.values[:, 0].max() <= 1
    assert len(explanation.quality["objective"]) == count


@pytest.mark.parametrize("method", ["deepdream", "inversion"])
def test_pictures_are_made_of_inputs(model: nn.Module, method: str) -> None:
    x = torch.rand(2, *SHAPE)
    explanation = made(model, method, x, layer="0")
    assert explanation.values.shape == x.shape
    assert not torch.allclose(explanation.values, x)


def test_the_logit_of_each_picture_is_its_own_target(model: nn.Module) -> None:
    explanation = made(model, "logit", None, [2, 0], input_shape=SHAPE, steps=1)
    with torch.no_grad():
        outputs = model.eval()(explanation.values)
    assert torch.allclose(torch.tensor(explanation.quality["objective"]), outputs[[0, 1], [2, 0]])
    assert explanation.target == (2, 0)


@pytest.mark.parametrize("method", ["filter", "layer", "logit", "deepdream", "inversion"])
def test_the_same_seed_makes_the_same_picture_and_leaves_the_model_alone(model: nn.Module, method: str) -> None:
    inputs = torch.rand(1, *SHAPE)
    target = 0 if method == "logit" else None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (made(model, method, inputs, target, steps=2) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["filter", "layer", "logit", "deepdream", "inversion"])
def test_other_weights_make_another_picture(model: nn.Module, method: str) -> None:
    inputs, target = torch.rand(1, *SHAPE), 0 if method == "logit" else None
    first = made(model, method, inputs, target).values
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert not torch.allclose(first, made(model, method, inputs, target).values)


def test_rows_are_made_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    explanation = made(model, "logit", None, 1, input_shape=(4,), steps=30)
    assert explanation.values.shape == (1, 4)
    assert explanation.quality["objective"] > explanation.quality["objective_at_start"]


@pytest.mark.parametrize("suffix", ["png", "json", "html"])
def test_pictures_are_saved(model: nn.Module, suffix: str, tmp_path: Path) -> None:
    explanation = made(model, "inversion", torch.rand(2, 3, 8, 8)[:, :2], layer="0")
    assert explanation.save(tmp_path / f"picture.{suffix}").stat().st_size > 1000
    if suffix == "json":
        again = Explanation.load(tmp_path / "picture.json")
        assert torch.equal(again.values, explanation.values)


@pytest.mark.parametrize(
    ("method", "inputs", "target", "options", "error", "message"),
    [
        ("filter", None, None, {}, ConfigurationError, "input_shape is missing"),
        ("logit", None, None, {"input_shape": SHAPE}, ConfigurationError, "target is None"),
        ("logit", None, 7, {"input_shape": SHAPE}, ConfigurationError, r"channel \[7\]"),
        ("filter", None, None, {"input_shape": SHAPE, "low": 0.0}, ConfigurationError, "give both, or neither"),
        ("filter", None, None, {"input_shape": SHAPE, "low": 1.0, "high": 0.0}, ConfigurationError, "below the high"),
        ("filter", None, None, {"input_shape": SHAPE, "layer": "9"}, ConfigurationError, "no layer '9'"),
        ("layer", torch.rand(1, *SHAPE), None, {"input_shape": (1, 2, 2)}, ConfigurationError, "leave out one"),
        ("deepdream", None, None, {}, DataError, "starts from an input"),
        ("inversion", torch.ones(1, 2, 8, 8, dtype=torch.long), None, {}, DataError, "real numbers"),
    ],
)
def test_what_no_picture_can_be_made_of_is_refused(
    model: nn.Module,
    method: str,
    inputs: Tensor | None,
    target: int | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        made(model, method, inputs, target, **options)
