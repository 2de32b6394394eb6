"""The verb: it refuses before anything changes, leaves models as they were, and says the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.explain import Explanation, explain, methods
from tests.explain.conftest import ConvNet, rescaled

GRADIENTS = ("saliency", "guided_backprop", "smoothgrad", "guided_smoothgrad")
PATHS = ("integrated_gradients", "guided_integrated_gradients")
CAMS = ("gradcam", "gradcam++", "scorecam")
PERTURBATIONS = ("lime", "kernelshap", "anchors", "cle")
LOCAL = (*GRADIENTS, *PATHS, *CAMS, *PERTURBATIONS)
QUICK: dict[str, dict[str, Any]] = {
    "lime": {"samples": 120, "segments": "grid"},
    "cle": {"samples": 120, "segments": "grid", "limit": 40},
    "kernelshap": {"samples": 120, "segments": "grid"},
    "anchors": {"batch": 10, "tolerance": 0.5, "longest": 2, "beam": 1, "certificate_samples": 100},
    "smoothgrad": {"samples": 5},
    "guided_smoothgrad": {"samples": 5},
}


def quarters(size: int) -> Tensor:
    """Nine squares of an image."""
    return torch.arange(size)[:, None] * 3 // size * 3 + torch.arange(size) * 3 // size


def quick(method: str) -> dict[str, Any]:
    options = dict(QUICK.get(method, {}))
    return {**options, "segments": quarters(12)} if method == "anchors" else options


class Contrast(nn.Module):
    """Each square speaks for some class by what it has beyond the mean, so that all classes occur among parts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(432, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x - x.mean((2, 3), keepdim=True)).flatten(1))


def changeable(method: str) -> nn.Module:
    """A model that says other things of other classes, and, for anchors, of what is perturbed."""
    return Contrast() if method == "anchors" else rescaled(ConvNet())


def state(model: nn.Module) -> list[Any]:
    hooks = [
        len(getattr(module, name, ()))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [
        hooks,
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [grad if grad is None else grad.tolist() for grad in grads],
        [value.tolist() for value in model.state_dict().values()],
    ]


@pytest.fixture
def used(conv_net: nn.Module) -> nn.Module:
    """A model in the middle of something: part of it frozen, part in evaluation mode, gradients on some of it."""
    conv_net.train()
    conv_net.norm.eval()
    conv_net.first_layer.weight.requires_grad_(False)
    conv_net.head.weight.grad = torch.full_like(conv_net.head.weight, 3.0)
    conv_net.head.register_forward_hook(lambda module, inputs, output: output)
    return conv_net


def test_all_local_methods_have_their_names() -> None:
    assert set(LOCAL) <= {name for name, method in methods().items() if method.scope == "local"}


@pytest.mark.parametrize("method", LOCAL)
def test_a_model_is_left_as_it_was(used: nn.Module, images: Tensor, method: str) -> None:
    before, gradient = state(used), used.head.weight.grad
    explain(used, images, method, **quick(method))
    assert state(used) == before
    assert used.head.weight.grad is gradient


@pytest.mark.parametrize("method", LOCAL)
def test_a_model_is_left_as_it_was_after_an_error(used: nn.Module, images: Tensor, method: str) -> None:
    calls = []

    def fail(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise FloatingPointError("the second call fails")

    used.head.register_forward_hook(fail)
    before = state(used)
    with pytest.raises(FloatingPointError, match="second call"):
        explain(used, images, method, **quick(method))
    assert state(used) == before


@pytest.mark.parametrize("method", LOCAL)
def test_the_same_seed_says_the_same(conv_net: nn.Module, images: Tensor, method: str) -> None:
    first, second = (explain(conv_net, images, method, seed=5, **quick(method)) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert first.quality == second.quality


@pytest.mark.parametrize("method", ["smoothgrad", "lime", "cle"])
def test_another_seed_says_something_else(conv_net: nn.Module, images: Tensor, method: str) -> None:
    first, second = (explain(conv_net, images, method, seed=seed, **quick(method)) for seed in (1, 2))
    assert not torch.equal(first.values, second.values)


def test_the_random_numbers_of_the_caller_go_on_as_they_were(conv_net: nn.Module, images: Tensor) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    explain(conv_net, images, "smoothgrad", samples=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", LOCAL)
def test_every_method_changes_with_the_target_class(images: Tensor, method: str) -> None:
    model = changeable(method)
    said = [explain(model, images[:1], method, target=target, **quick(method)) for target in range(4)]
    tellings = {str((one.values.tolist(), one.quality)) for one in said}
    assert len(tellings) == 4


@pytest.mark.parametrize("method", LOCAL)
def test_every_method_changes_with_the_weights(images: Tensor, method: str) -> None:
    said = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        said.append(explain(changeable(method), images[:1], method, target=1, **quick(method)))
    assert str((said[0].values.tolist(), said[0].quality)) != str((said[1].values.tolist(), said[1].quality))
    assert said[0].digest != said[1].digest


@pytest.mark.parametrize("method", LOCAL)
@pytest.mark.parametrize("channels", [1, 2])
def test_images_have_any_number_of_channels(method: str, channels: int) -> None:
    said = explain(rescaled(ConvNet(channels)), torch.rand(1, channels, 12, 12), method, **quick(method))
    assert said.values.isfinite().all()
    assert said.values.shape[-2:] == (12, 12)


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "scorecam", "lime", "kernelshap"])
def test_the_batch_size_changes_nothing(conv_net: nn.Module, images: Tensor, method: str) -> None:
    conv_net.double()
    small, large = (explain(conv_net, images.double(), method, batch_size=size, **quick(method)) for size in (3, 500))
    torch.testing.assert_close(small.values, large.values, rtol=1e-9, atol=1e-12)


def test_targets_may_be_one_for_each_input_or_a_function(conv_net: nn.Module, images: Tensor) -> None:
    both = explain(conv_net, images, "saliency", target=[2, 3])
    alone = [explain(conv_net, images[row : row + 1], "saliency", target=target) for row, target in ((0, 2), (1, 3))]
    torch.testing.assert_close(both.values, torch.cat([one.values for one in alone]))
    assert both.target == (2, 3)
    difference = explain(conv_net, images, "saliency", target=lambda outputs: outputs[:, 2] - outputs[:, 3])
    torch.testing.assert_close(
        difference.values,
        explain(conv_net, images, "saliency", target=2).values - explain(conv_net, images, "saliency", target=3).values,
    )
    assert difference.target is None


def test_the_target_is_the_largest_output_where_none_is_named(conv_net: nn.Module, images: Tensor) -> None:
    largest = conv_net.eval()(images).argmax(1)
    assert explain(conv_net, images, "saliency").target == tuple(largest.tolist())


def test_a_target_may_be_a_place_in_a_map(images: Tensor) -> None:
    said = explain(nn.Conv2d(3, 2, 3, padding=1), images, "saliency", target=(1, 4, 4))
    places = said.values.abs().sum((0, 1)).nonzero()
    assert places.min() == 3
    assert places.max() == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "salience"}, "did you mean saliency"),
        ({"method": "smoothgrad", "sample": 3}, "did you mean samples"),
        ({"method": "smoothgrad", "samples": 0}, "samples is 0"),
        ({"method": "smoothgrad", "noise": -1.0}, "noise is -1.0"),
        ({"method": "gradcam", "layer": "secondlayer"}, "second_layer"),
        ({"method": "gradcam", "layer": "head"}, "no places"),
        ({"method": "saliency", "target": 4}, "outside the model's 4 outputs"),
        ({"method": "saliency", "target": [0, 1, 2]}, "3 entries for 2 inputs"),
        ({"method": "saliency", "target": 0.5}, "target is 0.5"),
        ({"method": "saliency", "target": lambda outputs: outputs}, "one score for each of 2 inputs"),
        ({"method": "saliency", "seed": "x"}, "seed is 'x'"),
        ({"method": "saliency", "batch_size": 0}, "batch_size is 0"),
        ({"method": "saliency", "kind": "video"}, "kind is 'video'"),
        ({"method": "integrated_gradients", "baseline": torch.zeros(5)}, "baseline cannot be expanded"),
        ({"method": "lime", "segments": "circles"}, "segments is 'circles'"),
        ({"method": "lime", "training": np.zeros((3, 2))}, "training goes with rows"),
        ({"method": "lime", "hide": "nothing"}, "hide is 'nothing'"),
        ({"method": "lime", "samples": 1}, "samples is 1"),
        ({"method": "lime", "width": -1}, "width is -1"),
        ({"method": "cle", "spans": (1,)}, "sizes of combinations"),
        ({"method": "cle", "cared": (99,)}, "cared names features"),
        ({"method": "kernelshap", "background": torch.zeros(2, 3)}, "background has the shape"),
        ({"method": "anchors", "threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_what_cannot_work_is_refused(used: nn.Module, images: Tensor, options: dict[str, Any], message: str) -> None:
    before = state(used)
    with pytest.raises(ConfigurationError, match=message):
        explain(used, images, **options)
    assert state(used) == before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "at least one input"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite numbers"),
        ("a text", "takes tensors"),
        (None, "there are none"),
        (object(), "inputs are object"),
    ],
)
def test_inputs_that_cannot_be_explained_are_refused(conv_net: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        explain(conv_net, inputs, "saliency")


def test_an_image_without_a_batch_is_told_how_to_be_one(conv_net: nn.Module) -> None:
    with pytest.raises(DataError, match=r"inputs\[None\]"):
        explain(conv_net, torch.rand(3, 8, 8), "saliency", kind="images")


def test_a_function_is_refused_by_methods_that_need_a_module(images: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"methods for functions: .*lime"):
        explain(lambda x: x.mean((2, 3)), images, "saliency")


def test_a_function_that_does_not_answer_for_each_input_is_refused(images: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="one output for each"):
        explain(lambda x: x.mean((2, 3))[:1], images, "lime")


def test_functions_get_what_the_inputs_are() -> None:
    seen: list[type] = []

    def ask(batch: Any) -> Any:
        seen.append(type(batch))
        return np.ones((len(batch), 2)) * [0.25, 0.75]

    explain(ask, np.zeros((1, 3)), "lime", samples=5)
    explain(ask, torch.zeros(1, 3), "lime", samples=5)
    explain(ask, ["three words here"], "lime", samples=5)
    assert set(seen[:2]) == {np.ndarray}
    assert Tensor in seen
    assert seen[-1] is list


@pytest.mark.parametrize("method", LOCAL)
def test_progress_is_reported_up_to_the_end(conv_net: nn.Module, images: Tensor, method: str) -> None:
    told: list[tuple[int, int]] = []
    explain(conv_net, images, method, progress=lambda done, total: told.append((done, total)), **quick(method))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_explanation_can_be_kept_and_read_back(conv_net: nn.Module, images: Tensor, tmp_path: Any) -> None:
    said = explain(conv_net, images, "integrated_gradients", target=1, seed=4)
    read = Explanation.load(said.save(tmp_path / "said.json"))
    assert torch.equal(read.values, said.values)
    assert torch.equal(read.inputs, said.inputs)
    assert (read.method, read.kind, read.target, read.seed, read.digest) == (
        said.method,
        said.kind,
        said.target,
        said.seed,
        said.digest,
    )
    assert read.quality == said.quality
    assert read.options == said.options


@pytest.mark.parametrize("method", ["saliency", "gradcam", "anchors"])
def test_an_explanation_can_be_drawn(conv_net: nn.Module, images: Tensor, tmp_path: Any, method: str) -> None:
    content = explain(conv_net, images, method, **quick(method)).save(tmp_path / "said.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_rows_texts_and_signals_can_be_drawn() -> None:
    row = explain(lambda rows: rows @ np.ones((3, 2)), np.ones((1, 3)), "kernelshap", names=["a", "b", "$c$"])
    text = explain(
        lambda texts: np.array([[len(text), 1.0] for text in texts]), ["costs $5 or more"], "lime", samples=20
    )
    signal = explain(lambda x: x.mean(1), torch.rand(1, 2, 40), "lime", samples=20)
    for said in (row, text, signal):
        assert said.png(dots_per_inch=40).startswith(b"\x89PNG")


def test_files_of_other_kinds_are_refused(conv_net: nn.Module, images: Tensor, tmp_path: Any) -> None:
    said = explain(conv_net, images, "saliency")
    with pytest.raises(ConfigurationError, match=r"expected \.png, \.json, \.html"):
        said.save(tmp_path / "said.pdf")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="not an explanation"):
        Explanation.load(tmp_path / "other.json")
