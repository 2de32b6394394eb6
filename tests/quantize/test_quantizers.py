"""Quantisers: what they must keep to for any tensor, and what the original gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kaisa.errors import ConfigurationError
from kaisa.grids import in_type_at_random_
from kaisa.quantize import exact_variance, quantize
from kaisa.quantize.quantizers import KINDS, range_of, rounded
from tests.support.codes import codes_of

SHAPES = [
    (),
    (1,),
    (2,),
    (7,),
    (5, 3),
    (1, 6),
    (2, 6),
    (6, 1),
    (4, 3, 2),
    (3, 4, 5, 6),
    (2, 3, 4, 5, 6),
    (0, 3),
    (3, 0),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class WithoutWaiting(TorchDispatchMode):
    """Refuses every operation whose result the host would have to wait for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique", "masked_select", ".item")
        assert not any(word in name for word in waits), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_type_and_strides_stay(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    found = quantize(x, kind, 4)
    assert (found.shape, found.dtype, found.stride()) == (x.shape, dtype, x.stride())
    assert torch.equal(x, before)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_in_memory_changes_nothing(kind: str) -> None:
    x = torch.randn(4, 3, 5, 6)
    plain = quantize(x, kind, 8, stochastic=False)
    for other in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)):
        found = quantize(other, kind, 8, stochastic=False)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
        assert found.stride() == other.stride() or not other[0].is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_get_what_float32_gets(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 6).bfloat16()
    found = quantize(x.to(dtype), kind, 4, stochastic=False)
    torch.testing.assert_close(found, quantize(x.float(), kind, 4, stochastic=False).to(dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 1e-5)])
def test_of_short_types_too_the_mean_is_what_was_rounded(kind: str, dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(12, 10) * scale).to(dtype)
    draws = torch.stack([quantize(x, kind, 8, generator=generator(seed)) for seed in range(400)]).double()
    squared_error = (draws.mean(0) - x.double()).square().sum() * len(draws)
    assert 0.6 < float(squared_error / draws.var(0).sum()) < 1.5  # χ² over its degrees of freedom


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_short_type_has_is_not_moved(dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & ((numbers == 0) | (numbers.float().abs() >= 2.0**-119))]
    assert torch.equal(in_type_at_random_(numbers.float(), dtype), numbers)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert not bool(in_type_at_random_(odd, dtype).isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_every_input_has_a_finite_result_close_to_it(kind: str, count: int, bits: int, scale: float) -> None:
    x = torch.randn(count, 6) * scale
    inputs = {
        "normal": x,
        "zeros": torch.zeros_like(x),
        "constant": torch.full_like(x, 0.7 * scale),
        "positive": x.abs(),
        "negative": -x.abs(),
        "nearly positive": torch.where(x == x.amin(), -3e-3 * x.abs().amax(), x.abs()),
        "single column": x[:, :1],
        "constant rows": x[:, :1].expand_as(x),
    }
    for name, values in inputs.items():
        found = quantize(values, kind, bits, generator=generator())
        assert bool(found.isfinite().all()), name
        span = float(values.abs().amax().double())
        worst = 4 if kind == "bhq" else 2
        assert float((found.double() - values.double()).abs().amax()) <= worst * span / (2**bits - 2), name


@pytest.mark.parametrize("kind", ["psq", "bhq"])
@pytest.mark.parametrize("value", [0.25, 0.7, 1e3])
def test_rows_of_equal_numbers_stay_what_they_are(kind: str, value: float) -> None:
    x = torch.full((8, 5), value)
    torch.testing.assert_close(quantize(x, kind, 4), x, rtol=1e-6, atol=0)
    column = torch.randn(8, 1)  # a regression head
    torch.testing.assert_close(quantize(column, kind, 4), column, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constant", [1e4, -1e4, 1e7])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_large_equal_numbers_leave_nothing_in_others(bits: int, constant: float) -> None:
    x = torch.tensor([[constant] * 4, [0.0, 0.3, 0.7, 1.0]])
    found = quantize(x, "bhq", bits, stochastic=False)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x[1], rtol=0, atol=0.5 / (2**bits - 1) + 1e-6)
    shifted = x.double() + torch.tensor([[0.0], [constant]])
    assert float(exact_variance(shifted, "bhq", bits)) == pytest.approx(float(exact_variance(x, "bhq", bits)), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_a_small_negative_side_gives_numbers_where_the_original_gives_none(bits: int) -> None:
    x = torch.linspace(0, 1, 64).reshape(8, 8)
    for least in (0.0, -1e-12, -3e-3, -0.05):
        x[0, 0] = least
        draws = torch.stack([quantize(x, "ptq", bits, generator=generator(seed)) for seed in range(400)]).double()
        deviation = float(exact_variance(x, "ptq", bits)) ** 0.5
        assert float((draws.mean(0) - x.double()).norm()) < 1.3 * deviation / 400**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-100, -33, 90])
def test_tiny_and_huge_gradients_are_quantised_as_those_of_size_one(kind: str, exponent: int) -> None:
    x = torch.randn(16, 9) * torch.logspace(0, -3, 16).unsqueeze(1)
    expected = quantize(x, kind, 4, generator=generator())
    found = quantize(x * 2.0**exponent, kind, 4, generator=generator())
    assert torch.equal(found, expected * 2.0**exponent)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 1000), st.sampled_from(KINDS), st.integers(2, 8))
def test_codes_and_grid_give_back_what_quantize_returns(count: int, size: int, seed: int, kind: str, bits: int) -> None:
    x = torch.randn(count, size, generator=generator(seed))
    encoded = codes_of(x, kind, bits, generator=generator(seed))
    low = torch.as_tensor(encoded.grid.low)
    assert torch.equal(encoded.codes, encoded.codes.round())
    assert bool(((encoded.codes >= low) & (encoded.codes <= low + 2**bits - 1)).all())
    assert torch.equal(encoded.values, quantize(x, kind, bits, generator=generator(seed)))


def test_zero_stays_zero_per_tensor() -> None:
    x = torch.randn(20, 30)
    x[x.abs() < 0.5] = 0
    for bits in range(2, 9):
        assert bool((quantize(x, "ptq", bits)[x == 0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_close_and_sixteen_closer(kind: str) -> None:
    x = torch.randn(32, 40)
    assert relative_error(quantize(x, kind, 8), x) < 0.02
    assert relative_error(quantize(x, kind, 16, stochastic=False), x) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_decides_all(kind: str) -> None:
    x = torch.randn(9, 7)
    state = torch.get_rng_state()
    first = quantize(x, kind, 3, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, quantize(x, kind, 3, generator=generator(1)))
    assert not torch.equal(first, quantize(x, kind, 3, generator=generator(2)))
    torch.manual_seed(5)
    global_one = quantize(x, kind, 3)
    torch.manual_seed(5)
    assert torch.equal(global_one, quantize(x, kind, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_the_nearest_draws_nothing_and_halves_the_largest_error(kind: str) -> None:
    x = torch.randn(12, 10)
    state = torch.get_rng_state()
    nearest = codes_of(x, kind, 4, stochastic=False)
    assert torch.equal(torch.get_rng_state(), state)
    if kind != "bhq":
        assert bool(((nearest.values - x).abs() <= nearest.grid.step * 0.5001).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_so(kind: str, bad: float) -> None:
    x = torch.randn(6, 5)
    x[2, 3] = bad
    assert not bool(quantize(x, kind, 8).isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stochastic", [True, False])
def test_gradients_pass_straight_through(kind: str, stochastic: bool) -> None:
    x = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5, 4)
    (quantize(x, kind, 4, stochastic=stochastic) * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    with torch.no_grad():
        assert not quantize(x, kind, 4).requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (17, 5), (8, 3, 4, 4)])
def test_no_host_waits(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with WithoutWaiting():
        quantize(x, kind, 4)
        rounded(x, kind, 4, stochastic=False)
    with FakeTensorMode():
        assert quantize(torch.empty(shape), kind, 4).shape == shape


def test_the_detector_of_waiting_detects() -> None:
    x = torch.randn(4)
    for waits in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: (x > 0).nonzero()):
        with WithoutWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            waits()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("kind", KINDS)
def test_quantisers_compile_as_one_graph(kind: str) -> None:
    def halved(x: Tensor) -> Tensor:
        return quantize(x * 0.5, kind, 4, stochastic=False)

    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(halved, fullgraph=True, backend="eager")
    x = torch.randn(9, 5, requires_grad=True)
    found = compiled(x)
    torch.testing.assert_close(found, halved(x))
    found.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))
    random = torch.compile(lambda x: quantize(x, kind, 8), fullgraph=True, backend="eager")
    assert relative_error(random(x.detach()), x.detach()) < 0.05


def test_a_range_from_outside_is_kept_to() -> None:
    x = torch.linspace(-2, 2, 50).reshape(10, 5)
    low, high = torch.tensor(-1.0), torch.tensor(0.5)
    found = rounded(x, "ptq", 8, ranges=(low, high), aligned=False, stochastic=False)
    torch.testing.assert_close(found, x.clamp(-1, 0.5), rtol=0, atol=0.5 * 1.5 / 255 + 1e-6)
    assert [float(end) for end in range_of(x)] == [-2.0, 2.0]
    with pytest.raises(ConfigurationError, match="ranges are given for kind 'psq'"):
        rounded(x, "psq", 8, ranges=(low, high))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), "hadamard", 4), "kind is 'hadamard'; give one of 'ptq', 'psq'"),
        ((torch.ones(2, 2), "psq", 1), "bits is 1; give an integer from 2 to 16"),
        ((torch.ones(2, 2), "psq", 4.0), r"bits is 4\.0"),
        ((torch.ones(2, 2, dtype=torch.int64), "psq", 4), r"x holds torch\.int64"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantize(*arguments)
    with pytest.raises(ConfigurationError, match=message):
        exact_variance(*arguments)
