"""Gradients: Captum's values, the axioms, ReLUs of every kind, tokens, signals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.explain import explain
from tests.explain.conftest import ConvNet, SignalNet, rescaled

attr = pytest.importorskip("captum.attr", reason="needs captum (pip install 'kaisa[explain]')")
EXACT = {"rtol": 1e-12, "atol": 1e-14}


class Relus(nn.Module):
    """Two layers with a ReLU that is written in some way."""

    def __init__(self, relu: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.relu = nn.Linear(5, 16), nn.Linear(16, 3), relu

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


WAYS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
}


@pytest.fixture
def double_net(conv_net: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    return conv_net.double().eval(), images.double()


def test_saliency_is_captums(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    for absolute in (False, True):
        expected = attr.Saliency(model).attribute(x.clone().requires_grad_(), target=2, abs=absolute)
        torch.testing.assert_close(explain(model, x, "saliency", 2, absolute=absolute).values, expected, **EXACT)


def test_guided_backpropagation_is_captums_where_relus_are_modules(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    said = explain(model, x, "guided_backprop", 2).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it sets hooks
        expected = attr.GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=2)
    torch.testing.assert_close(said, expected, **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_relu_is_guided(way: str) -> None:
    x = torch.randn(4, 5)
    guided = explain(Relus(WAYS[way]), x, "guided_backprop", 1).values
    model = Relus(WAYS["module"])
    hidden = model.first(x)
    expected = ((hidden > 0) * model.second.weight[1].clamp(min=0)) @ model.first.weight
    torch.testing.assert_close(guided, expected.detach())
    assert not torch.allclose(guided, explain(model, x, "saliency", 1).values)


@pytest.mark.parametrize("way", ["module in place", "function in place", "method in place"])
def test_what_a_relu_changes_in_place_stays_changed(way: str) -> None:
    class Forgetful(Relus):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            self.relu(hidden)  # what it returns is not read
            return self.second(hidden * hidden)

    x = torch.randn(4, 5)
    model = Forgetful(WAYS[way])
    hidden = model.first(x)
    expected = (2 * hidden.relu() * model.second.weight[1]).clamp(min=0) @ model.first.weight
    torch.testing.assert_close(explain(model, x, "guided_backprop", 1).values, expected.detach())


def test_a_model_without_relus_is_refused_by_guided_methods() -> None:
    with pytest.raises(ConfigurationError, match="the model calls none"):
        explain(Relus(torch.tanh), torch.randn(2, 5), "guided_backprop")


def test_integrated_gradients_are_captums(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    baseline = torch.full_like(x, 0.2)
    for multiply in (True, False):
        expected = attr.IntegratedGradients(model, multiply_by_inputs=multiply).attribute(
            x, baseline, target=1, n_steps=30
        )
        said = explain(model, x, target=1, baseline=0.2, steps=30, multiply_by_inputs=multiply)
        torch.testing.assert_close(said.values, expected, **EXACT)


def test_smoothgrad_is_captums(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    said = explain(model, x[:1], "smoothgrad", 1, samples=7, noise=0.2, seed=9)
    torch.manual_seed(9)
    spread = 0.2 * float(x[:1].max() - x[:1].min())
    tunnel = attr.NoiseTunnel(attr.Saliency(model))
    expected = tunnel.attribute(
        x[:1].clone().requires_grad_(), nt_type="smoothgrad", nt_samples=7, stdevs=spread, target=1, abs=False
    )
    torch.testing.assert_close(said.values, expected, **EXACT)


@pytest.mark.parametrize("absolute", [False, True])
def test_smoothgrad_means_gradients_or_their_sizes(absolute: bool) -> None:
    class Square(nn.Module):  # its gradient, 2x, is as random as the noise is
        def forward(self, x: Tensor) -> Tensor:
            return x**2

    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    said = explain(Square(), x, "smoothgrad", 0, samples=4000, noise=0.5, absolute=absolute).values[0, 0]
    # E|2 noise| = 2 · 0.5 · √(2/π); the deviation of the mean is below 1/√4000 = 0.016.
    assert float(said) == pytest.approx((2 / torch.pi) ** 0.5 if absolute else 0.0, abs=0.06)


@pytest.mark.parametrize(("smooth", "plain"), [("smoothgrad", "saliency"), ("guided_smoothgrad", "guided_backprop")])
def test_without_noise_smoothgrad_is_the_gradient(
    double_net: tuple[nn.Module, Tensor], smooth: str, plain: str
) -> None:
    model, x = double_net
    said = explain(model, x, smooth, samples=3, noise=0.0).values
    torch.testing.assert_close(said, explain(model, x, plain).values, **EXACT)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), start=st.floats(-1, 1))
def test_integrated_gradients_complete(seed: int, start: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    said = explain(model, x, target=1, baseline=start, steps=60)
    difference = (model(x) - model(torch.full_like(x, start)))[:, 1]
    torch.testing.assert_close(said.values.sum(1), difference.detach(), rtol=1e-6, atol=1e-8)
    assert max(said.quality["completeness_gap"]) < 1e-6


def test_each_input_has_its_own_baseline(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    baseline = torch.rand_like(x)
    expected = attr.IntegratedGradients(model).attribute(x, baseline, target=1, n_steps=8)
    torch.testing.assert_close(explain(model, x, target=1, baseline=baseline, steps=8).values, expected, **EXACT)


def test_the_completeness_gap_is_that_of_the_values(double_net: tuple[nn.Module, Tensor]) -> None:
    model, x = double_net
    for method in ("integrated_gradients", "guided_integrated_gradients"):
        said = explain(model, x, method, target=1, steps=3)
        difference = (model(x) - model(torch.zeros_like(x)))[:, 1].detach()
        gap = (said.values.sum((1, 2, 3)) - difference).abs()
        assert said.quality["completeness_gap"] == pytest.approx(gap.tolist(), rel=1e-6, abs=1e-12)


def _network(seed: int) -> tuple[nn.Module, nn.Linear, Tensor]:
    """Return a random network, its first layer, and inputs."""
    torch.manual_seed(seed)
    first = nn.Linear(5, 8)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return model, first, torch.randn(3, 5, dtype=torch.float64)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), blind=st.integers(0, 4), target=st.integers(0, 2))
def test_an_input_without_a_weight_gets_nothing_of_any_network(seed: int, blind: int, target: int) -> None:
    model, first, x = _network(seed)
    with torch.no_grad():
        first.weight[:, blind] = 0
    for method in ("saliency", "integrated_gradients", "guided_backprop", "smoothgrad"):
        assert (explain(model, x, method, target).values[:, blind] == 0).all()
    # KernelSHAP solves a least-squares problem, to the last digits of float64 alone.
    assert explain(model, x, "kernelshap", target).values[:, blind].abs().max() < 1e-10


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), target=st.integers(0, 2))
def test_inputs_of_equal_weights_and_values_get_the_same_of_any_network(seed: int, target: int) -> None:
    model, first, x = _network(seed)
    with torch.no_grad():
        first.weight[:, 3] = first.weight[:, 1]
    x[:, 3] = x[:, 1]
    for method in ("saliency", "integrated_gradients", "guided_backprop", "kernelshap"):
        values = explain(model, x, method, target).values
        torch.testing.assert_close(values[:, 3], values[:, 1], rtol=1e-9, atol=1e-10)


def test_tokens_are_explained_at_their_embeddings(token_net: nn.Module) -> None:
    tokens = torch.tensor([[3, 7, 7, 1, 0], [2, 2, 9, 4, 5]])
    keep = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    token_net.double()
    said = explain(token_net, tokens, target=1, steps=200, arguments={"keep": keep})
    assert said.kind == "tokens"
    assert said.values.shape == tokens.shape
    assert said.values[0, 4] == 0  # masked, so that nothing reads it
    assert (said.values[1] != 0).all()
    assert max(said.quality["completeness_gap"]) < 1e-3
    sizes = explain(token_net, tokens, "saliency", 1, arguments={"keep": keep}).values
    assert (sizes >= 0).all()


class Bag(nn.Module):
    """A linear model of words and, looked up first, of places."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.words = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1]))
        return self.head((self.words(tokens) + places).sum(1))


def test_tokens_of_a_linear_model_get_their_terms_and_the_size_of_their_weight() -> None:
    model, tokens = Bag().double(), torch.tensor([[3, 7, 7, 1], [2, 2, 8, 4]])
    words, weight = model.words.weight.detach(), model.head.weight[1].detach()
    near = {"rtol": 1e-6, "atol": 1e-7}  # Captum holds the weights of its steps in float32
    found = explain(model, tokens, target=1, steps=3).values
    torch.testing.assert_close(found, words[tokens] @ weight, **near)
    found = explain(model, tokens, target=1, steps=3, baseline=5).values
    torch.testing.assert_close(found, (words[tokens] - words[5]) @ weight, **near)
    sizes = explain(model, tokens, "saliency", 1).values
    torch.testing.assert_close(sizes, weight.norm().expand(2, 4), **EXACT)


def test_tokens_of_a_model_without_embeddings_are_refused() -> None:
    class Counts(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.one_hot(tokens, 5).double().sum(1)

    with pytest.raises(ConfigurationError, match=r"no nn\.Embedding"):
        explain(Counts(), torch.tensor([[1, 2]]), "saliency")


def test_signals_are_explained_as_images_are() -> None:
    model, x = rescaled(SignalNet()).double(), torch.rand(2, 2, 30, dtype=torch.float64)
    for method in ("saliency", "guided_backprop", "smoothgrad", "integrated_gradients"):
        assert explain(model, x, method, 1).values.shape == x.shape
    expected = torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)[0]
    torch.testing.assert_close(explain(model, x, "saliency", 1).values, expected, **EXACT)


def test_a_frozen_model_in_half_precision_is_explained() -> None:
    model = ConvNet().bfloat16().requires_grad_(False)
    x = torch.rand(1, 3, 8, 8).bfloat16()
    for method in ("saliency", "gradcam"):
        assert explain(model, x, method).values.isfinite().all()
