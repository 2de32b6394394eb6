"""Robustness: bounds that no search breaks, and searches that find what is there."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from kaisa.assure.evidence.held_out import lower_bound
from kaisa.assure.evidence.robustness import _chain, _margins, _through, certify_robustness, search_robustness
from kaisa.errors import ConfigurationError, DataError


def corners(x: Tensor, radius: float) -> Tensor:
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=x.numel())), dtype=x.dtype)
    return x.flatten() + radius * signs


def test_of_a_linear_model_the_certificate_is_exact() -> None:
    model = nn.Linear(4, 3).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    y = model(x).argmax(-1)
    found = _margins([model], x, y, 0.2).detach()
    for index in range(20):
        logits = model(corners(x[index], 0.2))
        others = logits.clone()
        others[:, y[index]] = -torch.inf
        least = (logits[:, y[index]] - others.amax(-1)).min()
        assert found[index] == pytest.approx(least.item(), abs=1e-12)


def test_of_normalisation_and_of_single_layers_the_bounds_are_those_of_the_corners() -> None:
    norm = nn.BatchNorm1d(4).double()
    norm(3 * torch.randn(50, 4, dtype=torch.float64))  # so that it has seen something
    norm.weight.data = torch.tensor([1.5, -0.7, -2.0, 0.3], dtype=torch.float64)
    for layer in (norm.eval(), nn.Linear(4, 3).double(), nn.Tanh(), nn.LeakyReLU()):
        x = torch.randn(1, 4, dtype=torch.float64)
        centre, spread = _through(layer, (x, torch.full_like(x, 0.3)))
        reached = layer(corners(x, 0.3))
        assert torch.allclose(centre - spread, reached.amin(0, keepdim=True), rtol=1e-12)
        assert torch.allclose(centre + spread, reached.amax(0, keepdim=True), rtol=1e-12)


NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 6, 2), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6, 3),
    ),
    "ends in a sigmoid": lambda: nn.Sequential(nn.Linear(16, 3), nn.Sigmoid()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_change_within_the_radius_undercuts_the_certified_margin(name: str) -> None:
    model = NETWORKS[name]().double()
    if name == "convolutions":
        model(torch.randn(50, 16, dtype=torch.float64))  # so that the normalisation has seen something
    model.eval()
    x = torch.randn(6, 16, dtype=torch.float64)
    y = model(x).argmax(-1)
    certified = _margins(_chain(model), x, y, 0.05)
    for _ in range(300):
        logits = model(x + torch.empty_like(x).uniform_(-0.05, 0.05))
        others = logits.scatter(1, y[:, None], -torch.inf)
        assert (logits.gather(1, y[:, None]).squeeze(1) - others.amax(-1) >= certified - 1e-12).all()


def separated() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that errs beyond a distance of 1 from each input: its sign decides."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [1.0, 3.0], [-1.0, -2.0]])
    return model, x, torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(("radius", "robust"), [(0.9, 4), (1.1, 0)])
def test_both_methods_know_where_the_boundary_is(radius: float, robust: int) -> None:
    model, x, y = separated()
    for found in (certify_robustness(model, x, y, radius), search_robustness(model, x, y, radius)):
        assert (found.robust, found.right, found.inputs) == (robust, 4, 4)
        assert found.value == lower_bound(robust, 4)


def test_wrong_answers_are_not_robust() -> None:
    model, x, y = separated()
    for found in (certify_robustness(model, x, 1 - y, 0.1), search_robustness(model, x, 1 - y, 0.1)):
        assert (found.robust, found.right) == (0, 0)


def test_what_is_certified_is_never_broken_by_the_search() -> None:
    model = NETWORKS["perceptron"]()
    x = torch.randn(100, 16)
    y = model(x).argmax(-1)
    certified = certify_robustness(model, x, y, 0.02, batch_size=32)
    searched = search_robustness(model, x, y, 0.02, steps=10, starts=2, batch_size=32)
    assert 0 < certified.robust <= searched.robust < 100


def test_the_same_seed_searches_the_same_and_the_model_stays() -> None:
    model = NETWORKS["convolutions"]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(20, 16), torch.randint(3, (20,))
    assert search_robustness(model, x, y, 0.1, seed=5) == search_robustness(model, x, y, 0.1, seed=5)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_bound_is_refused_by_name() -> None:
    x, y = torch.randn(4, 16), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ConfigurationError, match="GELU is no chain of layers with interval bounds"):
        certify_robustness(nn.Sequential(nn.Linear(16, 3), nn.GELU()), x, y, 0.1)
    circular = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    padded = nn.Sequential(nn.Unflatten(1, (1, 16)), circular, nn.Flatten())
    with pytest.raises(ConfigurationError, match="padding by circular has no interval bound"):
        certify_robustness(padded, x, y, 0.1)
    with pytest.raises(ConfigurationError, match="radius is -1"):
        search_robustness(nn.Linear(16, 3), x, y, -1.0)
    with pytest.raises(ConfigurationError, match="0 steps"):
        search_robustness(nn.Linear(16, 3), x, y, 0.1, steps=0)
    with pytest.raises(DataError, match="4 inputs with 3 targets"):
        search_robustness(nn.Linear(16, 3), x, y[:3], 0.1)
