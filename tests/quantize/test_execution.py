"""Products in integers: the accumulators of the simulation to the last bit, and its results but for rounding."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from kaisa import grids
from kaisa.errors import DifferentiationError
from kaisa.optim import AdaHessian
from kaisa.quantize import QuantConfig, execution, prepare, reflections, set_mode
from tests.support.codes import codes_of

QUANTIZERS = ("ptq", "psq", "bhq")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What is multiplied in integers, and the accumulators; sums of codes, which are products with ones, left out."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    multiply = torch._int_mm

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        result = multiply(left, right)
        if not (left == 1).all() and not (right == 1).all():
            seen.append((left.clone(), right.clone(), result.clone()))
        return result

    monkeypatch.setattr(torch, "_int_mm", recorded)
    return seen


def centred(x: Tensor, kind: str, bits: int, *, stochastic: bool, aligned: bool = True) -> Tensor:
    """Return the codes of the simulation, moved as integers of 8 bits are, in 64 bits."""
    encoded = codes_of(x, kind, bits, stochastic=stochastic, aligned=aligned)
    return (encoded.codes - encoded.grid.low - 2 ** (bits - 1)).long()


@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_accumulators_are_those_of_the_codes_of_the_simulation(
    products: list[tuple[Tensor, Tensor, Tensor]], kind: str, bits: int
) -> None:
    layer = nn.Linear(96, 40)
    config = QuantConfig(
        quantizer=kind,
        activation_bits=bits,
        weight_bits=bits,
        gradient_bits=bits,
        weight_gradient_bits=bits,
        execution="int8",
    )
    x, gradient = torch.randn(600, 96, requires_grad=True), torch.randn(600, 40)
    y = prepare(layer, config)(x)
    torch.manual_seed(1)
    y.backward(gradient)
    torch.manual_seed(1)
    for_x = centred(gradient, kind, bits, stochastic=True)
    for_weight = for_x if kind == "ptq" else centred(gradient, "column", bits, stochastic=True)
    a = centred(x, "ptq", bits, stochastic=False, aligned=False)
    w = centred(layer.weight, "ptq", bits, stochastic=False)
    expected = [a @ w.mT, for_x @ w, for_weight.mT @ a]
    assert [sums.dtype for _, _, sums in products] == [torch.int32] * 3
    for (_, _, sums), exact in zip(products, expected, strict=True):
        assert torch.equal(sums.long(), exact)


def both(config: dict[str, object], layer: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Return output and gradients of the simulation and of integers, with the same noise."""
    results = []
    for how in ("simulate", "int8"):
        own, inputs = copy.deepcopy(layer), x.clone().requires_grad_()
        prepare(own, QuantConfig(**config, execution=how))
        torch.manual_seed(1)
        y = own(inputs)
        channels_last = y.movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else y
        channels_last.backward(torch.linspace(-1, 3, y.numel()).sin().view(channels_last.shape))
        results.append([y.detach(), inputs.grad, *(parameter.grad for parameter in own.parameters())])
    return results


@pytest.mark.parametrize("shape", [(33, 24), (6, 7, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers_have_the_results_of_the_simulation(
    products: list[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, ...], kind: str, has_bias: bool
) -> None:
    simulated, executed = both({"quantizer": kind}, nn.Linear(24, 10, bias=has_bias), torch.randn(shape) + 1)
    in_integers = 3 if kind == "ptq" or len(shape) == 2 else 2  # one grid a column of (batch, …, out) is no factor
    assert len(products) == in_integers
    for own, other in zip(executed, simulated, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * other.abs().max().item())


def test_sums_that_32_bits_do_not_hold_are_sums_of_floats(products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """With all codes but one −128, the sum over 2¹⁸ rows is 2³² too much for its type."""
    x, results = torch.zeros(2**18, 8), []
    x[7, 3] = 1.0
    layer = nn.Linear(8, 8)
    for how in ("simulate", "int8"):
        own = prepare(copy.deepcopy(layer), QuantConfig(quantizer="ptq", execution=how))
        own(x).backward(x)
        results.append((own.weight.grad, own.bias.grad))
    assert len(products) == 1  # the forward pass; x has no gradient
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(2**17, 8), (8, 2**17)])
def test_layers_whose_sums_would_be_too_long_are_simulated(sides: tuple[int, int]) -> None:
    weight, config = torch.empty(1, 1).expand(sides), QuantConfig(execution="int8")
    assert not execution.is_in_integers(config, torch.empty(1, 1).expand(4, sides[1]), weight)
    assert execution.is_in_integers(config, torch.empty(4, 8), weight[:8, :8])


@pytest.mark.parametrize("shape", [(12, 24), (12, 3, 24)])
def test_examples_with_large_equal_gradients_leave_nothing_in_others(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(*shape[:-1], 10)
    gradient[4] = 1e4
    found = []
    for how in ("simulate", "int8"):
        torch.manual_seed(1)
        layer, x = nn.Linear(24, 10), torch.zeros(shape, requires_grad=True)
        prepare(layer, QuantConfig(weight_gradient_bits=None, execution=how))(x).backward(gradient)
        found.append(x.grad)
    for own, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * other.abs().max().item())


def test_a_graphics_processor_is_asked_for_all_three_products() -> None:
    for rows, size, columns in itertools.product((8, 16, 20, 24, 32), repeat=3):
        products = [(rows, size, columns), (rows, columns, size), (columns, rows, size)]
        are_all_taken = all(left > 16 and summed % 8 == 0 and right % 8 == 0 for left, summed, right in products)
        assert execution.is_taken(torch.device("cuda"), rows, size, columns) is are_all_taken
        assert execution.is_taken(torch.device("cpu"), rows, size, columns)


@pytest.mark.parametrize("how", ["simulate", "int8"])
def test_in_evaluation_what_is_not_a_number_stays_so_in_its_example(how: str) -> None:
    layer = prepare(nn.Linear(24, 10).requires_grad_(False), QuantConfig(execution=how))
    x = torch.randn(5, 3, 24)
    layer(x)
    expected = layer.eval()(x)
    x[3, 1, 7] = torch.nan
    found = layer(x)
    assert found[3, 1].isnan().all()
    found[3, 1] = expected[3, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"mode": "qat"}, {"gradient_bits": None}, {"weight_gradient_bits": None}])
def test_what_is_not_quantised_is_a_product_of_floats(options: dict[str, object]) -> None:
    simulated, executed = both({"quantizer": "ptq", **options}, nn.Linear(24, 10), torch.randn(33, 24))
    for own, other in zip(executed, simulated, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 6, 1), nn.Conv2d(8, 6, 1, bias=False), nn.Conv3d(8, 6, 1)])
def test_convolutions_with_kernels_of_1_are_products_in_integers(
    products: list[tuple[Tensor, Tensor, Tensor]], layer: nn.Module
) -> None:
    size = layer.weight.ndim - 2
    simulated, executed = both({"quantizer": "ptq"}, layer, torch.randn(3, 8, *[4] * size))
    assert len(products) == 3
    for own, other in zip(executed, simulated, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 1, stride=2), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 8, 1, groups=2)])
def test_other_convolutions_are_simulated(products: list[tuple[Tensor, Tensor, Tensor]], layer: nn.Module) -> None:
    simulated, executed = both({"quantizer": "ptq"}, layer, torch.randn(3, 8, 5, 5))
    assert not products
    assert all(torch.equal(own, other) for own, other in zip(executed, simulated, strict=True))


def test_integers_are_chosen_by_themselves_where_they_pay(
    products: list[tuple[Tensor, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (prepare(nn.Linear(256, size), QuantConfig(execution="auto")) for size in (128, 4))
    x = torch.randn(256, 256)
    monkeypatch.setattr(execution, "is_fast", lambda device: False)
    large(x)
    assert not products
    monkeypatch.setattr(execution, "is_fast", lambda device: True)
    small(x), large(x), large(x[:32]), large.double()(x.double())
    assert len(products) == 1
    set_mode(large.float(), "exact")(x)
    assert len(products) == 1


def test_under_mixed_precision_the_output_has_its_type() -> None:
    layer = prepare(nn.Linear(24, 10), QuantConfig(execution="int8"))
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_of_the_input_a_quarter_of_the_memory_is_kept() -> None:
    layer = prepare(nn.Linear(64, 10), QuantConfig(execution="int8"))
    sizes: list[int] = []
    x = torch.randn(32, 64)

    def keep(value: Tensor) -> Tensor:
        sizes.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        layer(x)
    assert sum(sizes) < 1.1 * (x.nbytes + layer.weight.nbytes) / 4


def test_adahessian_is_told_that_integers_have_no_second_derivative() -> None:
    layer = prepare(nn.Linear(24, 10), QuantConfig(execution="int8"))
    optimizer = AdaHessian(layer.parameters())
    with pytest.raises(DifferentiationError, match="_IntegerLinear"):
        optimizer.backward(layer(torch.randn(5, 24)).square().sum())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_in_parts_the_results_are_those_of_the_simulation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_CACHED", 100)
    monkeypatch.setattr(reflections, "_CACHED", 33 * 4)
    assert len(grids.parts_of(torch.empty(33, 24))) == 9
    simulated, executed = both({"quantizer": kind}, nn.Linear(24, 10), torch.randn(33, 24))
    for own, other in zip(executed, simulated, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * other.abs().max().item())
