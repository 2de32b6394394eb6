"""Layers in few bits against values of the original implementation, and what their gradients are on average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa import grids
from kaisa.grids import Grid
from kaisa.quantize import QuantConfig, convert, prepare, quantize, rounding, set_mode
from kaisa.quantize.attention import QuantizedMultiheadAttention
from kaisa.quantize.rounding import rounded

ALL_BITS = {
    "activation_bits": None,
    "weight_bits": None,
    "bias_bits": None,
    "gradient_bits": None,
    "weight_gradient_bits": None,
}
GOLDEN = Path(__file__).parent / "golden" / "statquant_layers.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))
    return found


def layer_of(golden: dict[str, Any], name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the layer, its input and its output gradient."""
    given = {key: torch.tensor(value) for key, value in golden["inputs"].items()}
    if name == "conv":
        conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        conv.load_state_dict({"weight": given["W"]})
        return conv, given["X"].requires_grad_(), given["GO"]
    linear = nn.Linear(6, 4)
    linear.load_state_dict({"weight": given["WL"], "bias": given["BL"]})
    return linear, given["XL"].requires_grad_(), given["GL"]


@pytest.fixture
def original_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's choice of the code of 0 by rounding down; ours is the finer of two grids, with less variance."""

    def aligned(low: Tensor, high: Tensor, bins: int) -> Grid:
        below, above = 1e-8 - low.clamp_max(0), high.clamp_min(0) + 1e-8
        codes_below = (below * bins / (above + below)).floor().clamp_min(1)
        return Grid(below / codes_below, None, -codes_below, bins)

    monkeypatch.setattr(grids, "aligned", aligned)


@pytest.mark.usefixtures("original_grids")
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_outputs_and_gradients_of_qat_are_those_of_the_original(golden: dict[str, Any], name: str) -> None:
    layer, x, gradient = layer_of(golden, name)
    output = prepare(layer, QuantConfig(mode="qat"))(x)
    output.backward(gradient)
    expected = golden["cases"][f"{name}|qat"]
    found = {"output": output, "grad_input": x.grad, "grad_weight": layer.weight.grad}
    if name == "linear":
        found["grad_bias"] = layer.bias.grad
    for key, value in found.items():
        reference = torch.tensor(expected[key])
        torch.testing.assert_close(value, reference, rtol=0, atol=1e-5 * reference.abs().max().item(), msg=key)


FQT = ("conv|PTQ|8", "conv|PTQ|4", "conv|PSQ|8", "conv|PSQ|4", "conv|BHQ|8", "conv|BHQ|5")
FQT += ("linear|PTQ|8", "linear|PTQ|5", "linear|PTQ|4", "linear|PSQ|8", "linear|PSQ|5", "linear|BHQ|4")
DRAWS = 200


def draws_of(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    drawn: dict[str, list[Tensor]] = {"grad_input": [], "grad_weight": []}
    for _ in range(DRAWS):
        inputs = x.detach().clone().requires_grad_()
        layer.zero_grad()
        layer(inputs).backward(gradient)
        drawn["grad_input"].append(inputs.grad.double())
        drawn["grad_weight"].append(layer.weight.grad.double())
    return {key: torch.stack(values) for key, values in drawn.items()}


@pytest.mark.usefixtures("original_grids")
@pytest.mark.parametrize("case", FQT)
def test_gradients_vary_as_much_as_those_of_the_original(golden: dict[str, Any], case: str) -> None:
    name, kind, bits = case.split("|")
    layer, x, gradient = layer_of(golden, name)
    prepare(layer, QuantConfig(quantizer=kind.lower(), gradient_bits=int(bits)))
    for key, drawn in draws_of(layer, x, gradient).items():
        variance, reference = drawn.var(0).sum().item(), golden["cases"][case][key]["var"]
        assert variance > 0
        if reference is not None:  # the original's is not a number there
            # Of so few draws the estimate itself is uncertain, which comes on top of the 10 % of the golden values.
            assert variance == pytest.approx(reference, rel=0.1 + 2 * _uncertainty(drawn)), key


def _uncertainty(drawn: Tensor) -> float:
    """Return the relative standard error of a total variance."""
    squares = (drawn - drawn.mean(0)).square().flatten(1).sum(1)
    return (squares.std() / squares.mean() / DRAWS**0.5).item()


@pytest.mark.parametrize("name", ["conv", "linear"])
@pytest.mark.parametrize("kind", ["ptq", "psq", "bhq"])
def test_the_mean_of_gradients_in_fqt_is_that_of_qat(golden: dict[str, Any], name: str, kind: str) -> None:
    layer, x, gradient = layer_of(golden, name)
    prepare(layer, QuantConfig(quantizer=kind, gradient_bits=4, weight_gradient_bits=4))
    drawn = draws_of(layer, x, gradient)
    layer.zero_grad()
    set_mode(layer, "qat")(x).backward(gradient)
    exact = {"grad_input": x.grad.double(), "grad_weight": layer.weight.grad.double()}
    for key, values in drawn.items():
        error = (values.mean(0) - exact[key]).square().sum() * DRAWS / values.var(0).sum()
        assert error < 3, key  # χ² over its degrees of freedom, of which there are few where one example outweighs all


def test_the_two_uses_of_a_gradient_have_bits_of_their_own() -> None:
    x, gradient = torch.randn(16, 6, requires_grad=True), torch.randn(16, 4)
    layer = prepare(nn.Linear(6, 4), QuantConfig(quantizer="psq", gradient_bits=2, weight_gradient_bits=8))
    drawn = draws_of(layer, x, gradient)
    weight = _rounded(layer.weight)
    expected = {
        "grad_input": _variance_through(gradient, "psq", 2, lambda g: g @ weight),
        "grad_weight": _variance_through(gradient, "column", 8, lambda g: g.mT @ _rounded(x, aligned=False)),
    }
    for key, values in drawn.items():
        assert values.var(0).sum().item() == pytest.approx(expected[key], rel=0.25), key


def test_input_weight_and_bias_have_bits_of_their_own() -> None:
    config = QuantConfig(activation_bits=3, weight_bits=5, bias_bits=4)
    linear, conv = nn.Linear(6, 4), nn.Conv1d(6, 4, 2)
    x, signal = torch.randn(7, 6), torch.randn(2, 6, 5)
    w, kernel = (rounded(layer.weight, 5, aligned=True) for layer in (linear, conv))
    assert not torch.equal(w, linear.weight)
    expected = F.linear(rounded(x, 3, aligned=False), w, rounded(linear.bias, 4, aligned=True))
    torch.testing.assert_close(prepare(linear, config)(x), expected)
    expected = F.conv1d(rounded(signal, 3, aligned=False), kernel, conv.bias)  # biases of convolutions stay
    torch.testing.assert_close(prepare(conv, config)(signal), expected)


def _rounded(x: Tensor, *, aligned: bool = True) -> Tensor:
    return rounded(x.detach(), 8, aligned=aligned)


def _variance_through(gradient: Tensor, kind: str, bits: int, use: Any) -> float:
    """Return the variance of what is made of a quantised gradient, by the definition."""
    values = torch.stack([use(quantize(gradient, kind, bits)).double() for _ in range(500)])
    return values.var(0).sum().item()


def test_a_gradient_quantised_alike_for_both_uses_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def quantize(x: Tensor, kind: str, bits: int, *, stochastic: bool) -> Tensor:
        calls.append((kind, bits))
        return x

    monkeypatch.setattr(rounding, "quantize", quantize)
    for config in (QuantConfig(quantizer="ptq"), QuantConfig(quantizer="ptq", gradient_bits=5), QuantConfig()):
        for layer, shape in ((nn.Linear(4, 3), (2, 4)), (nn.Conv1d(1, 2, 1), (2, 1, 4))):
            prepare(layer, config)(torch.randn(shape, requires_grad=True)).sum().backward()
    assert calls == [("ptq", 8)] * 2 + [("ptq", 5), ("ptq", 8)] * 2 + [("bhq", 8), ("column", 8)] * 2


def test_what_needs_no_gradient_is_not_quantised_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    monkeypatch.setattr(rounding, "quantize", lambda x, kind, bits, *, stochastic: kinds.append(kind) or x)
    for layer, shape in ((nn.Linear(4, 3), (2, 4)), (nn.Conv1d(1, 2, 1), (2, 1, 4))):
        prepare(layer)
        layer(torch.randn(shape)).sum().backward()
        layer.requires_grad_(False)(torch.randn(shape, requires_grad=True)).sum().backward()
    assert kinds == ["column", "bhq"] * 2


GEOMETRIES = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    (nn.Conv2d(2, 3, (3, 2), dilation=2, padding="same"), (2, 2, 7, 6)),
    (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", bias=False), (2, 2, 5, 6)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 6)),
    (nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 1, 3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), GEOMETRIES)
def test_convolutions_of_any_geometry_have_the_gradients_of_the_float_ones(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    def run() -> list[Tensor]:
        x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]

    layer.double()
    expected = [value.clone() for value in run()]
    prepare(layer, QuantConfig(**ALL_BITS))
    torch.testing.assert_close(run(), expected, rtol=1e-12, atol=1e-12)


def test_layers_are_differentiable_twice() -> None:
    for layer, shape in ((nn.Linear(3, 2), (4, 3)), (nn.Conv1d(1, 2, 2), (2, 1, 4))):
        prepare(layer.double(), QuantConfig(**ALL_BITS))
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(layer, x)


def test_memory_format_of_the_input_is_kept() -> None:
    layer = prepare(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------- attention


def _calls() -> list[tuple[str, Any, dict[str, Any]]]:
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    hidden = torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2])
    added = torch.zeros(2, 5).masked_fill_(hidden, -torch.inf)
    return [
        ("itself", lambda q, k: (q, q, q), {}),
        ("another", lambda q, k: (q, k, k), {"average_attn_weights": False}),
        ("two others", lambda q, k: (q, k, k.sin()), {"need_weights": False}),
        ("the past", lambda q, k: (q, q, q), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
        ("the past, seen", lambda q, k: (q, q, q), {"attn_mask": causal, "is_causal": True}),
        ("what is there", lambda q, k: (q, q, q), {"key_padding_mask": hidden}),
        ("both", lambda q, k: (q, q, q), {"key_padding_mask": added, "attn_mask": torch.randn(4, 5, 5)}),
    ]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", _calls(), ids=lambda call: call[0])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_attention_with_all_bits_is_that_of_torch(
    batch_first: bool, call: tuple[str, Any, dict[str, Any]], options: dict[str, Any]
) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    shape = (2, -1, 8) if batch_first else (-1, 2, 8)
    q, k = torch.randn(80).view(shape), torch.randn(112).view(shape)
    if call[0] != "another" and call[0] != "two others":
        k = q
    _, arguments, masks = call
    output, weights = module(*arguments(q, k), **masks)
    prepare(module, QuantConfig(**ALL_BITS))
    assert type(module) is QuantizedMultiheadAttention
    other, other_weights = module(*arguments(q, k), **masks)
    torch.testing.assert_close(other, output)
    assert (weights is None) == (other_weights is None)
    if weights is not None:
        torch.testing.assert_close(other_weights, weights)


def test_attention_to_other_features_is_that_of_torch() -> None:
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
    q, k, v = torch.randn(5, 2, 8), torch.randn(7, 2, 6), torch.randn(7, 2, 5)
    expected = module(q, k, v)
    torch.testing.assert_close(prepare(module, QuantConfig(**ALL_BITS))(q, k, v), expected)


def test_attention_to_a_sequence_without_a_batch_is_that_of_torch() -> None:
    module, x = nn.MultiheadAttention(8, 2), torch.randn(5, 8)
    hidden = torch.tensor([False] * 4 + [True])
    expected = module(x, x, x, key_padding_mask=hidden)
    torch.testing.assert_close(prepare(module, QuantConfig(**ALL_BITS))(x, x, x, key_padding_mask=hidden), expected)


def test_attention_drops_out_in_training_alone() -> None:
    module, x = prepare(nn.MultiheadAttention(8, 2, dropout=0.5), QuantConfig(ranges="batch")), torch.randn(5, 2, 8)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


class OwnLayer(nn.TransformerEncoderLayer):
    """What others make of torch's."""


class OwnEncoder(nn.TransformerEncoder):
    """Likewise."""


@pytest.mark.parametrize(
    ("container", "block"), [(nn.TransformerEncoder, nn.TransformerEncoderLayer), (OwnEncoder, OwnLayer)]
)
def test_an_encoder_is_quantised_in_evaluation_too(container: type[nn.Module], block: type[nn.Module]) -> None:
    encoder = container(block(8, 2, 16, 0.0, batch_first=True), 1).eval()
    attributes = [dict(vars(module)) for module in encoder.modules()]
    x, hidden = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    float_outputs = encoder(x, src_key_padding_mask=hidden).detach()
    with torch.no_grad():
        prepare(encoder, QuantConfig(activation_bits=3, ranges="batch"))
        found = encoder(x, src_key_padding_mask=hidden)
    assert (found - float_outputs)[~hidden].abs().max() > 0.01
    gradual = encoder(x, src_key_padding_mask=hidden)  # with gradients torch has no path of its own
    torch.testing.assert_close(found, gradual.detach())
    for module, before in zip(convert(prepare(encoder)).modules(), attributes, strict=True):
        assert vars(module) == before


def test_a_projection_is_quantised_by_examples_and_not_by_positions() -> None:
    """One loud example: its rows get a coarse grid, and those of the other example a fine one."""
    module = prepare(nn.MultiheadAttention(8, 2, bias=False), QuantConfig(quantizer="psq", gradient_bits=4))
    x = torch.randn(5, 2, 8, requires_grad=True)
    scale = torch.tensor([1.0, 1e3])[None, :, None]
    (module(x, x, x)[0] * scale).sum().backward()
    set_mode(module, "qat")
    exact = torch.autograd.grad((module(x, x, x)[0] * scale).sum(), x)[0]
    errors = (x.grad - exact).abs().amax((0, 2))
    assert 0 < errors[0] < errors[1] / 100
