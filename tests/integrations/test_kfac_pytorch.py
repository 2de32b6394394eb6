"""A script written for kfac-pytorch runs after one changed import line."""

import enum
import logging

import pytest
import torch
from torch import nn

import kaisa
from kaisa.integrations.kfac_pytorch import KFACPreconditioner


class ComputeMethod(enum.Enum):
    EIGEN = 1
    INVERSE = 2


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def train(net: nn.Sequential, kfac: kaisa.KFACPreconditioner) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(8, 2, 4, 4, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(8) % 4).backward()
        kfac.step()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("method", ["eigen", ComputeMethod.INVERSE])
def test_every_argument_of_the_other_library_is_taken(method: object) -> None:
    net = model()
    kfac = KFACPreconditioner(
        net,
        factor_update_steps=1,
        inv_update_steps=lambda step: 2,
        damping=lambda step: 0.01,
        factor_decay=0.9,
        kl_clip=0.01,
        lr=lambda step: 0.1,
        accumulation_steps=1,
        allreduce_bucket_cap_mb=0.0,
        assignment_strategy="memory",
        colocate_factors=False,
        compute_method=method,
        compute_eigenvalue_outer_product=False,
        symmetry_aware=True,
        grad_scaler=None,
        factor_dtype=torch.float32,
        inv_dtype=torch.float32,
        skip_layers=None,
        update_factors_in_hook=False,
        loglevel=logging.INFO,
    )
    assert all(torch.isfinite(parameter).all() for parameter in train(net, kfac))


def test_its_defaults_are_the_ones_of_the_other_library() -> None:
    first, second = model(), model()
    same = kaisa.KFACPreconditioner(second, factor_update_steps=1, inv_update_steps=1, damping=0.001, lr=0.1)
    torch.testing.assert_close(train(first, KFACPreconditioner(first)), train(second, same), rtol=0, atol=0)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(kaisa.ConfigurationError, match="compute_method is 'lu'; give 'eigen' or 'inverse'"):
        KFACPreconditioner(model(), compute_method="lu")
