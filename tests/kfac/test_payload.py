"""Messages: their length, their error, and that rounding at random is right on average."""

import math

import pytest
import torch

from kaisa.errors import ConfigurationError
from kaisa.kfac.payload import INT8, Payload, decode, encode, encoded_length

LIKE = torch.empty(0, dtype=torch.float64)


def numbers(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, max(1, count))[:count]


@pytest.mark.parametrize("form", [None, torch.bfloat16, torch.float32, INT8])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_a_message_is_as_long_as_was_said_and_comes_back_within_its_step(form: object, count: int) -> None:
    x = numbers(count)
    parts = [x[: count // 3], x[count // 3 :]]
    sizes = [part.numel() for part in parts]
    message = encode(parts, form, LIKE, seed=1)
    assert message.numel() == encoded_length(sizes, form)
    found = decode(message, sizes, form, torch.float64)
    assert found.shape == x.shape
    relative = {None: 0.0, torch.bfloat16: 2**-8, torch.float32: 2**-24, INT8: math.inf}[form]
    step = torch.zeros(count).double()
    if form == INT8:
        relative = 0.0
        blocks = [block for part in parts for block in part.split(128) if block.numel()]
        step = torch.cat([block.abs().max().expand(block.numel()) / 127 for block in blocks] or [step])
    assert bool(((found - x).abs() <= relative * x.abs() + step * (1 + 1e-5)).all())


def test_rounding_at_random_is_right_on_average() -> None:
    x, draws = numbers(300), 4000
    found = sum(decode(encode([x], INT8, LIKE, seed), [300], INT8, torch.float64) for seed in range(draws)) / draws
    step = torch.cat([part.abs().max().expand(part.numel()) / 127 for part in x.split(128)])
    # the error of one draw is within a step, its deviation at most half of one: five deviations of the mean
    assert bool(((found - x).abs() <= 5 * 0.5 * step / draws**0.5 + 1e-6 * x.abs()).all())


def test_equal_numbers_and_seeds_make_equal_messages() -> None:
    x = numbers(700)
    assert torch.equal(encode([x], INT8, LIKE, 7), encode([x], INT8, LIKE, 7))
    assert not torch.equal(encode([x], INT8, LIKE, 7), encode([x], INT8, LIKE, 8))


def test_zeros_stay_zero() -> None:
    assert torch.equal(
        decode(encode([torch.zeros(300)], INT8, LIKE, 0), [300], INT8, torch.float64), torch.zeros(300).double()
    )


@pytest.mark.parametrize("options", [{"statistics": torch.int8}, {"gradients": "int4"}, {"bucket_bytes": 0}])
def test_a_form_that_does_not_exist_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=f"Payload.{next(iter(options))} is"):
        Payload(**options)  # type: ignore[arg-type]


def test_a_type_may_be_named() -> None:
    assert Payload(statistics="bfloat16") == Payload(statistics=torch.bfloat16)
    assert Payload(gradients="int8").gradients == "int8"
    with pytest.raises(ConfigurationError, match=r"statistics is torch\.int32"):
        Payload(statistics="int32")
