"""What is told of a model without values is what a factor step of it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kaisa
from kaisa.errors import ConfigurationError
from kaisa.kfac.layers import LayerOptions
from kaisa.kfac.survey import survey


class Attention(nn.Module):
    """Attention, and a layer that is used twice, on named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = self.twice(torch.tanh(self.twice(self.norm(x))))
        scores: Tensor = self.head(x)
        return scores


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "convolutions": (convolutions, lambda: torch.randn(6, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randint(11, (6, 7))),
}


def positions_seen(model: nn.Module, x: Tensor, sharing: str) -> dict[str, float]:
    """Return how many positions entered the A of every layer in a factor step."""
    kfac = kaisa.KFACPreconditioner(model, lr=0.1, sharing=sharing)
    output = model(x)
    functional.mse_loss(output, torch.zeros_like(output)).backward()
    return {name: sums.positions for name, sums in kfac._capture.take().items()}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_those_of_a_factor_step(case: str, sharing: str) -> None:
    build, inputs = CASES[case]
    seen = positions_seen(build(), inputs(), sharing)
    told = survey(build(), inputs(), sharing=sharing)
    rows = {layer.shape.name: layer.rows for layer in told.layers if layer.kind in ("linear", "convolution")}
    assert rows
    assert rows == {name: seen[name] for name in rows}


def test_the_rows_of_other_layers_are_counted_by_hand() -> None:
    told = {layer.shape.name: layer for layer in survey(Attention(), torch.zeros(6, 7, dtype=torch.long)).layers}
    assert (told["embed"].kind, told["embed"].rows) == ("embedding", 2 * 6 * 7)
    assert (told["norm"].kind, told["norm"].rows) == ("norm", 6 * 7)
    assert (told["twice"].kind, told["twice"].rows) == ("linear", 2 * 6 * 7)
    batch_norm = survey(convolutions(), torch.zeros(6, 3, 8, 8)).layers[1]
    assert (batch_norm.kind, batch_norm.rows) == ("norm", 6 * 8 * 8)


@pytest.mark.parametrize("case", CASES)
def test_the_shapes_are_those_that_the_preconditioner_places(case: str) -> None:
    build, inputs = CASES[case]
    placed = kaisa.KFACPreconditioner(build(), lr=0.1).placement
    assert [shape.name for shape in survey(build(), inputs()).shapes] == [name for name, _ in placed.assignments]


def test_operations_of_a_forward_pass_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    told = survey(model, torch.zeros(2, 3, 8, 8), name="small")
    assert told.forward_flops == 2 * 2 * (4 * 27 * 36 + 144 * 5)
    assert (told.name, told.batch, told.parameters) == ("small", 2, 4 * 27 + 4 + 144 * 5 + 5)


def test_operations_of_statistics_are_those_of_the_route_taken() -> None:
    plain = nn.Conv2d(64, 32, 1, bias=False)
    (layer,) = survey(plain, torch.zeros(4, 64, 8, 8)).layers
    assert layer.operations == 2 * 4 * 64 * (64 * 64 + 32 * 32)
    wide = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    (layer,) = survey(wide, torch.zeros(4, 64, 32, 32)).layers
    rows = 4 * 32 * 32
    assert layer.kernel == (3, 3)
    assert layer.operations is not None
    # 15 shifts of 64² products and a G of 64², where unfolded patches take (9 · 64)² and 64².
    assert 2 * rows * (15 + 1) * 64**2 <= layer.operations < 1.1 * 2 * rows * (15 + 1) * 64**2


def test_products_that_add_in_place_are_counted() -> None:
    (layer,) = survey(nn.Conv2d(3, 5, 3, stride=3, bias=False), torch.zeros(4, 3, 9, 9)).layers
    assert layer.operations == 2 * 4 * 9 * (27**2 + 5**2)


class Remembers(nn.Module):
    """Keeps what it has seen, in a buffer and in an attribute, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.scale = torch.ones(4)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = x
        y: Tensor = self.linear(functional.dropout(self.norm(x))) * self.scale
        return y


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nothing_is_left_behind_on_the_model(device: str) -> None:
    model = Remembers().eval()
    model.linear.weight.grad = torch.ones(4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    survey(model.train(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), device=device)
    assert model.training
    assert model.cache is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers(), model.scale])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert torch.equal(torch.get_rng_state(), random)


def test_attention_gets_its_own_forward_back() -> None:
    model = Attention()
    survey(model, torch.zeros(2, 3, dtype=torch.long))
    assert "forward" not in vars(model.attend)


def test_a_model_that_is_being_trained_with_kfac_is_surveyed_without_counting() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kfac = kaisa.KFACPreconditioner(model, lr=0.1)
    told = survey(model, torch.zeros(3, 4))
    assert kfac._capture.take() == {}
    assert told.layers[0].rows == 3


def test_a_model_larger_than_this_machine_is_surveyed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**17, 2**17, bias=False) for _ in range(8)))
        x = torch.zeros(4, 2**17)
    told = survey(model, x)
    assert told.parameters == 8 * 2**34
    assert [layer.shape.a.is_diagonal for layer in told.layers] == [True] * 8


class LooksAtValues(nn.Module):
    """Goes another way for another value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) if float(x.sum()) == 0 else self.linear(self.linear(x))
        return y


def test_a_model_that_looks_at_values_is_refused_and_told_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"forward pass of LooksAtValues fails .*give device='cpu'"):
        survey(LooksAtValues(), torch.zeros(2, 2))


def test_a_model_that_looks_at_values_is_surveyed_where_it_has_some() -> None:
    rows = [survey(LooksAtValues(), x, device="cpu").layers[0].rows for x in (torch.zeros(3, 2), torch.ones(3, 2))]
    assert rows == [3, 6]


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = iter_of_a_generator()
    with pytest.raises(ConfigurationError, match="Sequential cannot be copied, which planning needs: cannot pickle"):
        survey(model, torch.zeros(2, 2))


def iter_of_a_generator() -> Any:
    yield 1


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no layer can be preconditioned"):
        survey(nn.Sequential(nn.Linear(2, 2)), torch.zeros(2, 2), skip_layers="Linear")


def test_options_choose_the_layers() -> None:
    told = survey(convolutions(), torch.zeros(2, 3, 8, 8), layer_options=LayerOptions(norms=False), skip_layers=["^0$"])
    assert [layer.shape.name for layer in told.layers] == ["3", "4", "6"]


@pytest.mark.parametrize("inputs", [torch.zeros(5, 4), (torch.zeros(5, 4),), {"input": torch.zeros(5, 4)}])
def test_inputs_are_a_tensor_a_tuple_or_a_mapping(inputs: Any) -> None:
    told = survey(nn.Sequential(nn.Linear(4, 2)), inputs)
    assert (told.batch, told.layers[0].rows) == (5, 5)


def test_a_frozen_layer_and_one_that_is_not_called_bring_no_rows() -> None:
    model = Remembers()
    model.unused = nn.Linear(3, 3)
    model.norm.requires_grad_(False)
    told = {layer.shape.name: layer.rows for layer in survey(model, torch.zeros(2, 4)).layers}
    assert told == {"linear": 2, "unused": 0}
