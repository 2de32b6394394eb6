from __future__ import annotations

import pytest
import torch
from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.recipes.models import MODELS, ResidualBlock, build_model


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 13)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    assert build_model(name, shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "layers", "millions"), [("resnet20", 20, 0.27), ("resnet32", 32, 0.46)])
def test_residual_networks_have_the_published_size(name: str, layers: int, millions: float) -> None:
    """He et al. 2016, table 6."""
    model = build_model(name, (3, 32, 32), 10)
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert len(found) == layers
    assert round(parameters / 1e6, 2) == millions


def test_a_block_without_its_convolutions_passes_the_input_on() -> None:
    block = ResidualBlock(2, 3, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(1, 1, 2, 2)], dim=1)
    assert torch.equal(block(x), expected)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="unknown model 'vgg'; choose from mlp, cnn, resn"):
        build_model("vgg", (3, 32, 32), 10)
