"""Curves and plots: they pass through the claim, and end where the prior does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kaisa.assure.claims import Question, ask
from kaisa.assure.claims_plots import draw_curves, draw_growth, separate_names
from kaisa.assure.claims_sensitivity import growth, sensitivity
from kaisa.assure.prior import Prior

PRIORS = [Prior({1e-3: 0.9}, floor=1e-4), Prior({1e-3: 0.2, 5e-3: 0.9}, floor=1e-4), Prior({0: 0.5})]
ASKED = [("confidence", 0.02), ("reliability", 20), ("expected_pfd", None)]


@pytest.mark.parametrize("prior", PRIORS, ids=Prior.describe)
@pytest.mark.parametrize(("kind", "at"), ASKED)
@pytest.mark.parametrize("failures", [0, 2])
def test_curves_pass_through_the_claim(kind: str, at: float | None, prior: Prior, failures: int) -> None:
    question = Question(kind, prior, at, 300, failures)  # type: ignore[arg-type]
    claim = ask(question)
    curves = sensitivity(question, 401)
    assert curves
    for curve in curves:
        assert list(curve.x) == sorted(set(curve.x))
        assert curve.x[0] <= curve.now <= curve.x[-1]
        assert np.interp(curve.now, curve.x, curve.y) == pytest.approx(claim.value, abs=0.02)


def test_growth_has_the_value_before_and_after_each_failure() -> None:
    question = Question("confidence", PRIORS[0], 0.02)
    failed = [False] * 50 + [True] + [False] * 49
    steps = growth(question, failed, points=10)
    known = {n: (k, value) for n, k, value in steps}
    assert (known[50][0], known[51][0], known[100][0]) == (0, 1, 1)
    assert known[51][1] < known[50][1]
    for n, (k, value) in known.items():
        assert value == ask(Question("confidence", PRIORS[0], 0.02, n, k)).value


def test_plots_are_pictures_whose_names_can_be_told_apart(tmp_path: Path) -> None:
    question = Question("confidence", PRIORS[0], 0.02, 100, 1)
    steps = growth(question, [False] * 99 + [True], points=5)
    svg = draw_growth(question, steps, 0.9, None)
    assert svg.startswith("<svg")
    assert 'id="first-' in separate_names(svg, "first")
    assert draw_curves(question, sensitivity(question, 5), 0.9, tmp_path / "curves.png") == ""
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
