"""The variance report: against dense derivatives in float64, draws through the whole network, and single examples."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.quantize import QuantConfig, allocate_bits, prepare, quantize, set_mode, variance_report
from kaisa.quantize.report import LAYERS, VarianceReport

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 4, generator=generator).double()
    x[3] *= 20  # an outlier
    return x, torch.arange(5) % 3


@contextmanager
def quantised(model: nn.Module, kind: str, bits: int, generator: torch.Generator) -> Iterator[None]:
    """Quantise the gradient of every layer's output, once for both its uses."""

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: quantize(gradient, kind, bits, generator=generator))

    handles = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, LAYERS)]
    yield
    for handle in handles:
        handle.remove()


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_the_theorems_sum_is_that_of_dense_derivatives() -> None:
    """γ is written out row by row, and the covariance of ε is that of draws of the quantiser alone."""
    model, (x, y) = network(), batch()
    report = variance_report(model, (x, y), kinds=("psq", "bhq"), bits=(4,), probes=1000)
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss, parameters = F.cross_entropy(model(x), y), list(model.parameters())
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    generator = torch.Generator().manual_seed(2)
    for layer, output, g in zip(report.layers, outputs, gradients, strict=True):
        rows = [
            torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in output.flatten()
        ]
        gamma = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        for kind in report.kinds:
            errors = torch.stack([quantize(g, kind, 4, generator=generator) - g for _ in range(4000)])
            expected = float((errors.flatten(1) @ gamma).square().sum(1).mean())
            assert layer.added(kind, 4) == pytest.approx(expected, rel=0.1), (layer.name, kind)
            assert layer.quantization[kind][4] == pytest.approx(float(errors.square().sum() / 4000), rel=0.05)


@pytest.mark.parametrize("kind", ["ptq", "bhq"])
def test_the_variance_through_the_whole_network_is_the_theorems_sum(kind: str) -> None:
    model, (x, y) = network(), batch()
    report = variance_report(model, (x, y), kinds=(kind,), bits=(6,), probes=1000)
    generator, draws = torch.Generator().manual_seed(3), 4000
    exact = gradient(model, F.cross_entropy(model(x), y))
    with quantised(model, kind, 6, generator):
        loss = F.cross_entropy(model(x), y)
        found = torch.stack(
            [
                torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
                for _ in range(draws)
            ]
        )
    variance = float(found.var(0).sum())
    assert report.added(kind, 6) == pytest.approx(variance, rel=0.05)
    assert float((found.mean(0) - exact).square().sum()) * draws / variance < 4  # unbiased: 1 on average


class Attentive(nn.Module):
    """Attention to itself, to another sequence, and to two others, with an encoder in between."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.MultiheadAttention(4, 2, batch_first=True), nn.MultiheadAttention(4, 1)
        self.apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, bias=False)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.own(x, x, x, need_weights=False)[0] + x).transpose(0, 1)
        z = x.transpose(0, 1).sin()
        y = y + self.other(y, z, z)[0]
        return (y + self.apart(y, z[..., :3], z[..., 1:3])[0]).mean(0)[:, :3]


PROJECTIONS = [
    "own.in_proj",
    "own.out_proj",
    "encoder.layers.0.self_attn.in_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.0.linear1",
    "encoder.layers.0.linear2",
    "other.q_proj",
    "other.kv_proj",
    "other.out_proj",
    "apart.q_proj",
    "apart.k_proj",
    "apart.v_proj",
    "apart.out_proj",
]


def attentive() -> tuple[nn.Module, Batch]:
    generator = torch.Generator().manual_seed(4)
    model = Attentive().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(5, 3, 4, generator=generator).double()
    x[3] *= 5
    return model, (x, torch.arange(5) % 3)


@pytest.mark.parametrize("kind", ["psq", "bhq"])
def test_projections_of_attention_add_what_training_in_few_bits_does(kind: str) -> None:
    """Against draws of the gradient of the prepared model, quantised for both uses where the theorem has it so."""
    model, (x, y) = attentive()
    report = variance_report(model, (x, y), kinds=(kind, "column"), bits=(6, 8), probes=200)
    assert [layer.name for layer in report.layers] == PROJECTIONS
    assert [layer.module for layer in report.layers[:2]] == ["own", "own"]
    exact = gradient(model, F.cross_entropy(model(x), y))
    nothing = {"activation_bits": None, "weight_bits": None, "bias_bits": None}
    prepare(model, QuantConfig(quantizer=kind, gradient_bits=6, **nothing))
    draws = 700
    loss = F.cross_entropy(model(x), y)
    found = torch.zeros(draws, len(exact), dtype=torch.float64)
    for draw in range(draws):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found[draw] = torch.cat([part.flatten() for part in parts])
    variance = float(found.var(0).sum())
    squares = (found - found.mean(0)).square().sum(1)
    uncertainty = float(squares.std() / squares.mean()) / draws**0.5
    assert report.added_by_branches((kind, 6), ("column", 8)) == pytest.approx(variance, rel=0.05 + 3 * uncertainty)
    assert float((found.mean(0) - exact).square().sum()) * draws / variance < 4


def test_gradients_of_projections_are_those_of_the_packed_weights() -> None:
    model, (x, y) = attentive()
    report = variance_report(model, (x, y), kinds=("psq",), bits=(8,), probes=1)
    squared = {layer.name: layer.squared_gradient for layer in report.layers}
    sampled = {layer.name: layer.sampling for layer in report.layers}
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()

    def norm(*parts: Tensor) -> float:
        return sum(float(part.square().sum()) for part in parts)

    own, other = model.own, model.other
    assert squared["own.in_proj"] == pytest.approx(norm(own.in_proj_weight.grad, own.in_proj_bias.grad))
    assert squared["own.out_proj"] == pytest.approx(norm(own.out_proj.weight.grad, own.out_proj.bias.grad))
    assert squared["other.q_proj"] == pytest.approx(norm(other.in_proj_weight.grad[:4], other.in_proj_bias.grad[:4]))
    assert squared["other.kv_proj"] == pytest.approx(norm(other.in_proj_weight.grad[4:], other.in_proj_bias.grad[4:]))
    assert squared["apart.k_proj"] == pytest.approx(norm(model.apart.k_proj_weight.grad))
    grads = []
    for i in range(5):
        model.zero_grad()
        (F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / 5).backward()
        grads.append(torch.cat([own.in_proj_weight.grad.flatten(), own.in_proj_bias.grad]))
    assert sampled["own.in_proj"] == pytest.approx(float(5 * torch.stack(grads).var(0).sum()))


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_model_with_attention_is_as_it_was(is_prepared: bool) -> None:
    model, (x, y) = attentive()
    expected = [
        layer.added("bhq", 4) for layer in variance_report(copy.deepcopy(model), (x, y), bits=(4,), probes=1).layers
    ]
    if is_prepared:
        prepare(model, QuantConfig(mode="exact"))
    kinds = [type(module) for module in model.modules()]
    for own in (model, model.eval()):  # in evaluation torch has a path that calls no modules
        found = variance_report(own, (x, y), bits=(4,), probes=1)
        assert [layer.added("bhq", 4) for layer in found.layers] == pytest.approx(expected)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in vars(module) for module in model.modules())


def test_sampling_is_the_variance_of_what_examples_add() -> None:
    model, (x, y) = network(), batch()
    report = variance_report(model, (x, y), kinds=("psq",), bits=(8,), probes=1)
    each = torch.stack([gradient(model, F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / 5) for i in range(5)])
    assert report.sampling == pytest.approx(float(5 * each.var(0).sum()), rel=1e-9)
    squares = sum(layer.squared_gradient for layer in report.layers)
    assert squares == pytest.approx(float(each.sum(0).square().sum()), rel=1e-9)
    assert report.examples == 5


def test_the_model_is_as_it_was() -> None:
    norm, relu = nn.BatchNorm2d(2), nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, relu, nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4) % 2
    state, noise = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    report = variance_report(model, (x, y), bits=(4, 8), probes=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert [layer.name for layer in report.layers] == ["0", "5"]


def test_a_layer_that_is_frozen_or_called_twice_is_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.again(self.first(x))))

    model = Twice()
    model.first.requires_grad_(False)
    report = variance_report(model, (torch.randn(6, 3), torch.arange(6) % 3), kinds=("psq",), bits=(4,), probes=2)
    assert [layer.name for layer in report.layers] == ["again", "again#2"]
    assert report.layers[0].below["psq"][4] == 0


def test_branches_are_added_each_by_its_own_quantiser() -> None:
    report = variance_report(network(), batch(), kinds=("bhq", "column"), bits=(4, 8), probes=2)
    own = sum(layer.own["column"][8] for layer in report.layers)
    below = sum(layer.below["bhq"][4] for layer in report.layers)
    assert report.added_by_branches(("bhq", 4), ("column", 8)) == pytest.approx(own + below)
    assert report.added("bhq", 4) == pytest.approx(report.added_by_branches(("bhq", 4), ("bhq", 4)))


def test_a_report_is_a_table_a_file_and_a_picture(tmp_path: Path) -> None:
    report = variance_report(network(), batch(), probes=1)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines if line] == [
        word for kind in report.kinds for word in (kind, "0", "3", "5", "all")
    ]
    assert lines[0].split()[1:4] == ["|gradient|²", "sampling", "8"]
    report.save(tmp_path / "report.json")
    assert VarianceReport.load(tmp_path / "report.json") == report
    older = json.loads((tmp_path / "report.json").read_text())
    for layer in older["layers"]:
        del layer["module"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert VarianceReport.load(tmp_path / "older.json") == report
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["qat", "fqt"])
def test_a_model_that_computes_in_few_bits_is_refused(mode: str) -> None:
    model = prepare(network().float(), QuantConfig(mode=mode))
    x, y = batch()
    for measure in (variance_report, partial(allocate_bits, budget=5)):
        with pytest.raises(ConfigurationError, match=f"in mode '{mode}'.*call set_mode\\(model, 'exact'\\)"):
            measure(model, (x.float(), y))
    assert variance_report(set_mode(model, "exact"), (x.float(), y), bits=(4,), probes=1).layers


def test_what_has_no_variance_is_refused() -> None:
    x, y = batch()
    with pytest.raises(ConfigurationError, match="the batch holds a single example"):
        variance_report(network(), (x[:1], y[:1]))
    with pytest.raises(ConfigurationError, match="no layer of the model got a gradient"):
        variance_report(nn.Sequential(nn.LayerNorm(4), nn.Flatten()), (torch.randn(3, 4), torch.arange(3)))
