"""Class activation maps: golden values, other libraries' values, layers by their real names, tokens, signals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.explain import cams, explain
from tests.explain.conftest import SignalNet, rescaled

CAMS = ("gradcam", "gradcam++", "scorecam")


def test_weights_and_maps_are_the_golden_ones(golden: dict[str, Any]) -> None:
    block = {name: torch.tensor(value, dtype=torch.float64)[None] for name, value in golden["cam"].items()}
    activations, gradients = block["activations"], block["grads"]
    weights = cams.gradcam_weights(activations, gradients)
    torch.testing.assert_close(weights, block["gradcam_weights"], rtol=1e-9, atol=0)
    torch.testing.assert_close(cams.weighted_map(activations, weights), block["gradcam_map"], rtol=1e-9, atol=0)
    weights = cams.scorecam_weights(block["scorecam_target_scores"])
    torch.testing.assert_close(weights, block["scorecam_weights"], rtol=1e-9, atol=0)
    torch.testing.assert_close(cams.weighted_map(activations, weights), block["scorecam_map"], rtol=1e-9, atol=0)


def test_gradcam_plus_plus_weights_follow_the_formula_place_by_place() -> None:
    a, g = torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    g[0, 0, 0, 0] = 0
    expected = torch.zeros(1, 3, dtype=torch.float64)
    for k in range(3):
        for i in range(2):
            for j in range(2):
                slope = float(g[0, k, i, j])
                if slope > 0:
                    alpha = slope**2 / (2 * slope**2 + float(a[0, k].sum()) * slope**3)
                    expected[0, k] += alpha * slope
    torch.testing.assert_close(cams.gradcam_plus_plus_weights(a, g), expected, rtol=1e-12, atol=0)


def test_gradcam_is_captums(conv_net: nn.Module, images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr", reason="needs captum (pip install 'kaisa[explain]')")
    model, x = conv_net.double().eval(), images.double()
    layer = attr.LayerGradCam(model, model.norm).attribute(x, target=1, relu_attributions=True)
    expected = F.interpolate(layer, (12, 12), mode="bilinear", align_corners=False)[:, 0]
    said = explain(model, x, "gradcam", 1, layer="norm", scaled=False)
    torch.testing.assert_close(said.values, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "theirs"), [("gradcam", "GradCAM"), ("scorecam", "ScoreCAM")])
def test_maps_are_torchcams(conv_net: nn.Module, images: Tensor, method: str, theirs: str) -> None:
    torchcam = pytest.importorskip("torchcam.methods", reason="needs torchcam (requirements-oracles.txt)")
    model, x = conv_net.double().eval(), images[:1].double()
    # A layer of the size of the input: torchcam scales before it enlarges, the paper (and this library) afterwards.
    # Its Grad-CAM++ divides a copy, so that its α is G²: that one is held against the formula alone.
    with getattr(torchcam, theirs)(model, "relu") as extractor:
        outputs = model(x.clone().requires_grad_())
        expected = extractor(1, outputs, normalized=False)[0]
    said = explain(model, x, method, 1, layer="relu", scaled=False)
    assert expected.max() > 0
    torch.testing.assert_close(said.values, expected.detach(), rtol=1e-6, atol=1e-9)


def activations_and_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """What a layer gives, and the gradient of the score at it, by hooks."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    score = model(x)[:, target].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept[0])[0]


def test_gradcam_plus_plus_is_its_weights_on_a_layer(conv_net: nn.Module, images: Tensor) -> None:
    model, x = conv_net.double().eval(), images.double()
    a, g = activations_and_gradients(model, model.relu, x, 1)
    said = explain(model, x, "gradcam++", 1, layer="relu", scaled=False)
    torch.testing.assert_close(said.values, cams.weighted_map(a, cams.gradcam_plus_plus_weights(a, g)))


@pytest.mark.parametrize("weights", ["channels", "classes"])
def test_scorecam_weighs_channels_by_what_they_show(conv_net: nn.Module, images: Tensor, weights: str) -> None:
    model, x = conv_net.double().eval(), images.double()
    enlarge = lambda maps: F.interpolate(maps[None], (12, 12), mode="bilinear", align_corners=False)[0]  # noqa: E731
    with torch.no_grad():
        maps = model.norm(model.second_layer(model.relu(model.first_layer(x))))
        for image, channels, said in zip(x, maps, explain_by_scorecam(model, x, weights), strict=True):
            scores = []
            for mask in enlarge(channels):
                seen = (mask - mask.min()) / (mask.max() - mask.min()) * image
                outputs = model(seen[None])[0]
                scores.append(outputs.softmax(0)[1] if weights == "classes" else outputs[1])
            found = torch.stack(scores)
            found = found if weights == "classes" else found.softmax(0)
            combined = sum(weight * channel for weight, channel in zip(found, channels, strict=True))
            assert combined.max() > 0
            torch.testing.assert_close(said, enlarge(combined.relu()[None])[0])


def explain_by_scorecam(model: nn.Module, x: Tensor, weights: str) -> Tensor:
    return explain(model, x, "scorecam", 1, layer="norm", weights=weights, scaled=False, batch_size=4).values


def test_a_layer_is_what_it_gave_before_an_operation_in_place(conv_net: nn.Module, images: Tensor) -> None:
    model = conv_net.eval()
    changed = explain(model, images, "gradcam", 1, layer="norm").values
    model.last_relu.inplace = False
    torch.testing.assert_close(explain(model, images, "gradcam", 1, layer="norm").values, changed)


@pytest.mark.parametrize("method", CAMS)
def test_the_last_layer_with_places_is_found(conv_net: nn.Module, images: Tensor, method: str) -> None:
    assert explain(conv_net, images, method).details["layer"] == "last_relu"


def test_layers_inside_others_go_by_their_whole_name(images: Tensor) -> None:
    model = nn.Sequential(
        nn.ModuleDict({"a_b": nn.Conv2d(3, 4, 3)})["a_b"], nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3))
    )
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = explain(model, images, "gradcam", layer="0.1.0")
    assert found.details["layer"] == "0.1.0"
    assert explain(model, images, "gradcam").details["layer"] == "0"


@pytest.mark.parametrize("method", CAMS)
def test_maps_are_scaled_to_the_unit_range(conv_net: nn.Module, images: Tensor, method: str) -> None:
    values = explain(conv_net, images, method, 1).values
    for value in values:
        assert (value.min(), value.max()) in ((0, 1), (0, 0))


def test_large_scores_do_not_overflow(conv_net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        conv_net.head.weight *= 1e4
    for method in CAMS:
        assert explain(conv_net, images, method).values.isfinite().all()


@pytest.mark.parametrize("method", CAMS)
def test_signals_have_maps_along_their_length(method: str) -> None:
    said = explain(rescaled(SignalNet()), torch.rand(2, 2, 30), method, 1)
    assert said.values.shape == (2, 30)
    assert said.details["layer"] == "narrow"


@pytest.mark.parametrize("channels", ["first", None])
def test_the_channels_of_a_signal_come_first(channels: str | None) -> None:
    model, x = rescaled(SignalNet()).double(), torch.rand(2, 2, 30, dtype=torch.float64)
    a, g = activations_and_gradients(model, model.narrow, x, 1)
    expected = (a * g.mean(2, keepdim=True)).sum(1).relu()
    assert expected.max() > 0
    said = explain(model, x, "gradcam", 1, layer="narrow", channels=channels, scaled=False)
    torch.testing.assert_close(said.values, expected)


def test_channels_may_come_last_in_layers_of_pictures() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Linear(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.places(x.permute(0, 2, 3, 1)).tanh().mean((1, 2)))

    model, x = Last().double(), torch.rand(2, 3, 6, 4, dtype=torch.float64)
    a, g = activations_and_gradients(model, model.places, x, 1)
    expected = (a * g.mean((1, 2), keepdim=True)).sum(3).relu()
    assert expected.max() > 0
    said = explain(model, x, "gradcam", 1, layer="places", channels="last", scaled=False)
    torch.testing.assert_close(said.values, expected)


def test_tokens_have_maps_in_the_last_layer_that_reads_them_all(token_net: nn.Module) -> None:
    tokens = torch.tensor([[3, 7, 7, 1, 0], [2, 2, 9, 4, 5]])
    said = explain(token_net, tokens, "gradcam", 2)
    assert said.values.shape == tokens.shape
    assert "encoder.layers.0" in said.details["layer"]
    with pytest.raises(ConfigurationError, match="tokens are not; use gradcam"):
        explain(token_net, tokens, "scorecam")


class PatchNet(nn.Module):
    """A picture as tokens after a class token, which alone is read in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.second(self.first(x))[:, 0])


def test_tokens_of_a_picture_become_a_picture() -> None:
    x = torch.rand(2, 3, 16, 16)
    said = explain(PatchNet(), x, "gradcam", 1, layer="first")
    assert said.values.shape == (2, 16, 16)
    assert said.details["places"] == [17]


def test_a_map_of_tokens_lies_where_they_lay_and_class_tokens_nowhere() -> None:
    model, x = PatchNet().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    a, g = activations_and_gradients(model, model.first, x, 1)
    combined = (a * g.mean(1, keepdim=True)).sum(2).relu()
    assert combined.max() > 0
    square = combined[:, 1:].reshape(1, 1, 4, 4)
    expected = F.interpolate(square, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    said = explain(model, x, "gradcam", 1, layer="first", scaled=False)
    torch.testing.assert_close(said.values, expected)


def test_tokens_that_are_no_square_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="22 tokens are no square"):
        cams._enlarged(torch.rand(1, 1, 22), torch.rand(1, 3, 16, 16))


def test_a_layer_that_is_not_called_is_refused(conv_net: nn.Module, images: Tensor) -> None:
    conv_net.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ConfigurationError, match="not called"):
        explain(conv_net, images, "gradcam", layer="spare")


def test_a_model_without_places_is_told_so() -> None:
    with pytest.raises(ConfigurationError, match="name one by layer="):
        explain(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(2, 3), "gradcam")
