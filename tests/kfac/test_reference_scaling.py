"""`factor_scaling="kaisa"` has the scale, the identity start and the KL clip of KAISA's own code.

With g the gradient at the hook (of the mean loss, not multiplied by the batch size) and S positions
of a convolution: A = ⟨aaᵀ⟩ / S² and G = ⟨ggᵀ⟩ / S², the mean taken over examples and positions, the
bias column of `a` a one that is divided by S like all others; F ← αF + (1 − α) F_new from F = I on;
ν = min(1, √(κ / |Σ lr² ⟨p, g⟩|)).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kaisa
from tests.support.canonical import canonical_gradient, canonical_input, gradient_matrix
from tests.support.kron import tikhonov_solve
from tests.support.recording import Recorded, recording

LAYERS = ["0", "2", "5"]
DECAY, LR, DAMPING, KL_CLIP = 0.9, 0.1, 0.003, 0.001
OPTIONS = {
    "factor_update_steps": 1,
    "inv_update_steps": 2,
    "damping": DAMPING,
    "factor_decay": DECAY,
    "kl_clip": KL_CLIP,
    "lr": LR,
}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(8, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (8,))


def reference_pair(record: Recorded) -> tuple[Tensor, Tensor]:
    rows = canonical_input(record.module, record.inputs[-1])[:, :, 0]
    gradients = canonical_gradient(record.module, record.gradients[-1])[:, :, 0]
    positions = rows.shape[1]
    return second_moment(rows / positions), second_moment(gradients / positions)


def second_moment(rows: Tensor) -> Tensor:
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.T @ rows / len(rows)


class Reference:
    """The reference implementation's formulas in dense algebra."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.decomposed: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, records: dict[str, Recorded]) -> None:
        for name, record in records.items():
            new = reference_pair(record)
            old = self.factors.get(name, tuple(torch.eye(len(f)).double() for f in new))
            self.factors[name] = tuple(DECAY * o + (1 - DECAY) * n for o, n in zip(old, new, strict=True))

    def precondition(self, raw: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if step % OPTIONS["inv_update_steps"] == 0:
            self.decomposed = dict(self.factors)
        solved = {name: tikhonov_solve(*self.decomposed[name], gradient, DAMPING) for name, gradient in raw.items()}
        product = sum((LR**2 * solved[name] * raw[name]).sum() for name in raw)
        scale = min(1.0, (KL_CLIP / abs(product.item())) ** 0.5)
        return {name: scale * gradient for name, gradient in solved.items()}


def test_factors_and_steps_are_those_of_the_published_formulas(model: nn.Module) -> None:
    reference = Reference()
    kfac = kaisa.KFACPreconditioner(model, factor_scaling="kaisa", inv_dtype=torch.float64, **OPTIONS)
    for step, (x, y) in enumerate(batches(4)):
        model.zero_grad()
        with recording(model, LAYERS) as records:
            F.cross_entropy(model(x), y).backward()
            raw = {n: gradient_matrix(model.get_submodule(n))[0].clone() for n in LAYERS}
            kfac.step()
        reference.update(records)
        for name in LAYERS:
            torch.testing.assert_close(tuple(kfac.factors[name]), reference.factors[name])
        for name, expected in reference.precondition(raw, step).items():
            found = gradient_matrix(model.get_submodule(name))[0]
            torch.testing.assert_close(found, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad


def test_the_reference_scale_is_wrong_by_the_positions_and_the_batch(model: nn.Module) -> None:
    """A ⊗ G of the two scalings differ by B² for a linear layer and by B² S⁵ for a convolution."""
    [(x, y)] = batches(1)
    products = {}
    for scaling in ("fisher", "kaisa"):
        twin = copy.deepcopy(model)
        options = {**OPTIONS, "factor_decay": 0.0, "factor_scaling": scaling}
        with kaisa.KFACPreconditioner(twin, **options) as kfac:
            F.cross_entropy(twin(x), y).backward()
            kfac.step()
            products[scaling] = {name: kfac.factors[name].a.trace() * kfac.factors[name].g.trace()
                                 for name in LAYERS}  # fmt: skip
    positions = {"0": 25, "2": 4, "5": 1}
    for name in LAYERS:
        ratio = products["fisher"][name] / products["kaisa"][name]
        expected = torch.tensor(len(x) ** 2 * float(positions[name]) ** 5).double()
        torch.testing.assert_close(ratio, expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_a_script_of_kfac_pytorch_gets_its_factors_and_steps(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("kfac.preconditioner", reason="needs gpauloski/kfac-pytorch on the path")
        twin = copy.deepcopy(model)
        theirs = peer.KFACPreconditioner(twin, **OPTIONS)
    ours = kaisa.KFACPreconditioner(model, factor_scaling="kaisa", inv_dtype=torch.float64, **OPTIONS)
    for x, y in batches(4):
        for network, preconditioner in ((model, ours), (twin, theirs)):
            network.zero_grad()
            F.cross_entropy(network(x), y).backward()
            preconditioner.step()
        for name, layer in theirs._layers.values():
            torch.testing.assert_close(kfac_pair(ours, name), (layer.a_factor, layer.g_factor))
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            # theirs decomposes in float32
            torch.testing.assert_close(mine.grad, other.grad.double(), rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                mine -= LR * mine.grad
                other.copy_(mine)


def kfac_pair(kfac: kaisa.KFACPreconditioner, name: str) -> tuple[Tensor, Tensor]:
    return kfac.factors[name].a, kfac.factors[name].g
