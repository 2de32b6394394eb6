"""Where the golden numbers of conservative Bayesian inference lie, and how a case of theirs is asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kaisa.assure.claims import Claim, confidence, reliability
from kaisa.assure.prior import Prior

GOLDEN = Path(__file__).parents[3] / "shared" / "reference" / "golden" / "cbi.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"] if GOLDEN.exists() else []


def cases(*names: str) -> list[Any]:
    """Return the cases whose names begin so, as parameters of a test."""
    if not CASES:
        return [pytest.param({}, marks=pytest.mark.skip(reason="the golden numbers (../shared/reference) are absent"))]
    chosen = [case for case in CASES if case["name"].startswith(names)]
    return [pytest.param(case, id=f"{case['name']}-{index}") for index, case in enumerate(chosen)]


def ask_case(case: dict[str, Any]) -> Claim:
    """Return the claim that a golden case is about."""
    given = case["inputs"]
    if "quantiles" in given:
        quantiles = dict(given["quantiles"])
    elif "theta0" in given:
        quantiles = {0: given["theta0"]}
    else:
        quantiles = {given["eps"]: given.get("theta", given.get("theta_at_least"))}
    prior = Prior(quantiles, floor=given.get("p_l", 0), at_least="theta_at_least" in given)
    seen = {"demands": given["n"], "failures": given.get("k", 0)}
    return reliability(given["t"], prior, **seen) if given.get("t") else confidence(given["p"], prior, **seen)
