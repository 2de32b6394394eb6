"""Factors at fixed weights: means over a data set, against loops over examples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import ConfigurationError, DataError
from kaisa.kfac import Factors, Fisher, mean_factors
from tests.support.fisher import empirical_fisher, exact_fisher, per_example_gradients


def summed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(examples: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, 5, dtype=torch.float64), torch.randint(3, (examples,))


def test_of_a_linear_model_and_one_example_the_exact_factors_are_the_dense_fisher() -> None:
    model = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    found = mean_factors(model, [x], fisher=Fisher("categorical", exact=True))[""]
    assert torch.allclose(
        torch.kron(found.g, found.a), exact_fisher(model, x, [model.weight], "categorical"), rtol=1e-12
    )


def test_the_factors_are_means_over_all_examples_however_they_are_batched() -> None:
    model, (x, _) = perceptron(), data()
    fisher = Fisher("categorical", exact=True)
    whole = mean_factors(model, [x], fisher=fisher)
    parts = mean_factors(model, [x[:5], x[5:6], x[6:]], fisher=fisher)
    hidden = torch.cat([torch.tanh(model[0](x)), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    probabilities = model(x).softmax(-1)
    g = (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]).mean(0)
    assert torch.allclose(whole["2"].a, hidden.mT @ hidden / len(x), rtol=1e-12)
    assert torch.allclose(whole["2"].g, g, rtol=1e-12)
    for name, pair in whole.items():
        assert torch.allclose(pair.a, parts[name].a, rtol=1e-12)
        assert torch.allclose(pair.g, parts[name].g, rtol=1e-12)
    assert whole.label.examples == parts.label.examples == 12


def test_the_empirical_g_of_the_last_layer_is_the_second_moment_of_residuals() -> None:
    model, (x, y) = perceptron(), data()
    found = mean_factors(model, [(x[:7], y[:7]), (x[7:], y[7:])], fisher="empirical", loss=summed_cross_entropy)
    residuals = model(x).softmax(-1) - F.one_hot(y, 3)
    assert torch.allclose(found["2"].g, residuals.mT @ residuals / len(x), rtol=1e-12)
    bias_only = [model[2].bias]
    gradients = per_example_gradients(model, x, y, summed_cross_entropy, bias_only)
    assert torch.allclose(found["2"].g, empirical_fisher(gradients), rtol=1e-12)


def test_labels_drawn_many_times_come_to_the_exact_factors() -> None:
    model, (x, _) = perceptron(), data()
    exact = mean_factors(model, [x], fisher=Fisher("categorical", exact=True))
    drawn = mean_factors(model, [x.repeat(2000, 1)], fisher="categorical", seed=3)
    for name, pair in exact.items():
        assert (drawn[name].g - pair.g).norm() < 0.03 * pair.g.norm()


def test_the_same_seed_draws_the_same_labels() -> None:
    model, (x, _) = perceptron(), data()
    first, second, other = (mean_factors(model, [x], seed=seed)["0"].g for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(32, 3))
    model[1].eval()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mean_factors(model, [torch.randn(4, 1, 6, 6)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert model[0].weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_they_are_saved_with_their_label(tmp_path: pytest.TempPathFactory) -> None:
    made = mean_factors(perceptron(), [data()[0]], fisher=Fisher("categorical", exact=True))
    made.save(f"{tmp_path}/factors.safetensors")
    read = Factors.load(f"{tmp_path}/factors.safetensors")
    assert read.label == made.label
    assert (read.label.average, read.label.fisher, read.label.examples) == ("mean", "exact categorical", 12)


def test_hooks_are_gone_after_an_error_too() -> None:
    model = perceptron()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mean_factors(model, [torch.randn(2, 7, dtype=torch.float64)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_bad_input_is_refused_in_words() -> None:
    model, (x, y) = perceptron(), data()
    with pytest.raises(ConfigurationError, match="the empirical Fisher needs loss="):
        mean_factors(model, [(x, y)], fisher="empirical")
    with pytest.raises(ConfigurationError, match="the others take no loss"):
        mean_factors(model, [(x, y)], loss=summed_cross_entropy)
    with pytest.raises(ConfigurationError, match="needs targets"):
        mean_factors(model, [x], fisher="empirical", loss=summed_cross_entropy)
    with pytest.raises(ConfigurationError, match="no layer of the model has a rule"):
        mean_factors(nn.Tanh(), [x])
    with pytest.raises(DataError, match="there are no examples"):
        mean_factors(model, [])
    with pytest.raises(DataError, match="a batch is str"):
        mean_factors(model, ["x"])
    with pytest.raises(DataError, match="A of layer 0 is not finite"):
        mean_factors(model, [x * float("nan")])
