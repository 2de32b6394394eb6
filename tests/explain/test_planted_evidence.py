"""A network learns to know a class by a magenta corner: every local method must point there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.explain import explain
from tests.explain.conftest import CORNER, MARKED

SQUARES = torch.arange(32)[:, None] * 5 // 32 * 5 + torch.arange(32) * 5 // 32  # of 6 or 7 pixels
OPTIONS: dict[str, dict[str, Any]] = {
    "saliency": {},
    "guided_backprop": {},
    "smoothgrad": {"samples": 10},
    "guided_smoothgrad": {"samples": 10},
    "integrated_gradients": {"steps": 20},
    "guided_integrated_gradients": {"steps": 20},
    "gradcam": {},
    "gradcam++": {},
    "scorecam": {},
    "lime": {"samples": 200},
    "cle": {"samples": 200, "limit": 40},
    "kernelshap": {"samples": 200},
    "anchors": {"segments": SQUARES, "batch": 20, "tolerance": 0.5, "beam": 1, "certificate_samples": 100},
}


def shares(values: Tensor) -> Tensor:
    """Return the share of each map's weight that lies in the corner."""
    maps = values.abs().sum(1) if values.dim() == 4 else values
    return maps[:, -CORNER:, -CORNER:].sum((1, 2)) / maps.sum((1, 2))


@pytest.mark.parametrize("method", OPTIONS)
def test_every_local_method_points_at_the_corner(planted: tuple[nn.Module, Tensor], method: str) -> None:
    model, pictures = planted
    pictures = pictures[:2]
    assert (model(pictures).argmax(1) == MARKED).all()
    said = explain(model, pictures, method, MARKED, batch_size=256, **OPTIONS[method])
    maps = said.values.abs().sum(1) if said.values.dim() == 4 else said.values
    smooth = F.avg_pool2d(maps[:, None].double(), 5, 1)[:, 0]  # places 0…27 of the middles 2…29
    highest = smooth.flatten(1).argmax(1)
    assert ((highest // 28 >= 22) & (highest % 28 >= 22)).all()
    assert (shares(said.values) > 5 * CORNER**2 / 32**2).all()
