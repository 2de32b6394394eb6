from __future__ import annotations

import pytest
import torch
from torch import nn

import kaisa
from kaisa.recipes.unet import GRAIN, UNet


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 32)])
def test_every_pixel_gets_a_logit(shape: tuple[int, int, int]) -> None:
    assert UNet(shape[0], 2)(torch.randn(2, *shape)).shape == (2, *shape[1:])
    assert shape[1] % GRAIN == 0


def test_the_network_has_the_published_size() -> None:
    """Buda et al. 2019's for LGG MRI, which the KAISA paper trains: 7,763,041 parameters."""
    assert sum(parameter.numel() for parameter in UNet(3, 32).parameters()) == 7_763_041


def test_every_convolution_is_covered_by_kfac() -> None:
    model = UNet(1, 2)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    kfac = kaisa.KFACPreconditioner(model, lr=0.1)
    model(torch.randn(2, 1, 16, 16)).mean().backward()
    kfac.step()
    covered = {model.get_submodule(name) for name in kfac.factors if not name.startswith("norm")}
    assert covered.issuperset(convolutions)
    kfac.close()


def test_what_goes_across_keeps_single_pixels() -> None:
    """The logits of a net whose lower levels say nothing still tell neighbouring pixels apart."""
    model = UNet(1, 4).eval()
    for widen in model.widen:
        nn.init.zeros_(widen.weight)
        nn.init.zeros_(widen.bias)
    x = torch.zeros(1, 1, 16, 16)
    flat = model(x)
    x[0, 0, 5, 6] = 1.0
    moved = (model(x) - flat).abs()[0]
    assert moved[5, 6] > 0
    assert moved[10:, 11:].max() == 0
