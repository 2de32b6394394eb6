"""Calibration against scikit-learn, and temperatures against what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kaisa.assure.evidence.calibration import fit_temperature, measure_calibration
from kaisa.errors import ConfigurationError, DataError


@pytest.fixture
def said() -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(800, 2, dtype=torch.float64)
    return logits.softmax(-1), torch.bernoulli(logits.softmax(-1)[:, 1] ** 1.5).long()


def test_figures_are_those_of_scikit_learn(said: tuple[Tensor, Tensor]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    calibration = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    probabilities, targets = said
    found = measure_calibration(probabilities, targets, bins=10)
    # Of two classes the score over both is twice that of the one that scikit-learn takes.
    assert found.brier == pytest.approx(2 * metrics.brier_score_loss(targets, probabilities[:, 1]), rel=1e-12)
    assert found.log_loss == pytest.approx(metrics.log_loss(targets, probabilities), rel=1e-9)
    confidence, predicted = probabilities.max(-1)
    right = (predicted == targets).numpy()
    accuracy, mean = calibration.calibration_curve(right, confidence.numpy(), n_bins=10)
    assert np.allclose([one.accuracy for one in found.bins], accuracy, rtol=1e-12)
    assert np.allclose([one.confidence for one in found.bins], mean, rtol=1e-12)
    counts = np.array([one.inputs for one in found.bins])
    assert counts.sum() == 800
    assert found.expected_error == pytest.approx((counts * np.abs(accuracy - mean)).sum() / 800, rel=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_as_in_scikit_learn() -> None:
    calibration = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    confidence = torch.tensor([0.5, 0.625, 0.75, 0.75, 0.875, 1.0], dtype=torch.float64)
    targets = torch.tensor([0, 1, 0, 1, 0, 0])
    found = measure_calibration(torch.stack([confidence, 1 - confidence], 1), targets, bins=4)
    accuracy, mean = calibration.calibration_curve((targets == 0).numpy(), confidence.numpy(), n_bins=4)
    assert [one.accuracy for one in found.bins] == pytest.approx(accuracy)
    assert [one.confidence for one in found.bins] == pytest.approx(mean)
    assert [(one.low, one.inputs) for one in found.bins] == [(0.25, 1), (0.5, 3), (0.75, 2)]


def test_honest_probabilities_are_calibrated_and_boasting_ones_are_not() -> None:
    logits = torch.randn(50_000, 4, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    assert measure_calibration(logits.softmax(-1), targets).expected_error < 0.01
    assert measure_calibration((3 * logits).softmax(-1), targets).expected_error > 0.15


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits = 2 * torch.randn(40_000, 5, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    found = fit_temperature(temperature * logits, targets)
    assert found == pytest.approx(temperature, rel=0.03)
    best = functional.cross_entropy(temperature * logits / found, targets)
    for other in (0.99 * found, 1.01 * found):
        assert functional.cross_entropy(temperature * logits / other, targets) > best


def test_logits_that_no_temperature_mends_are_refused() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    with pytest.raises(DataError, match="every target has the highest logit"):
        fit_temperature(logits, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="no temperature mends that"):
        fit_temperature(logits, torch.tensor([1, 0]))


def test_bad_input_is_refused(said: tuple[Tensor, Tensor]) -> None:
    probabilities, targets = said
    with pytest.raises(DataError, match="do not sum to 1"):
        measure_calibration(2 * probabilities, targets)
    with pytest.raises(DataError, match="do not sum to 1"):
        measure_calibration(probabilities * float("nan"), targets)
    with pytest.raises(DataError, match="no classes from 0 to 1"):
        measure_calibration(probabilities, targets + 1)
    with pytest.raises(DataError, match=r"give \(inputs, classes\)"):
        measure_calibration(probabilities[0], targets)
    with pytest.raises(ConfigurationError, match="bins is 0"):
        measure_calibration(probabilities, targets, bins=0)
    with pytest.raises(DataError, match="logits are not finite"):
        fit_temperature(probabilities * float("nan"), targets)
