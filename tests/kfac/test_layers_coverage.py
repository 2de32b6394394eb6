"""Every supported module: factors by brute force, preconditioned gradient by a dense solve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import kaisa
from kaisa.kfac import LayerOptions, MatrixLayer, norms, register
from tests.support.canonical import gradient_matrix
from tests.support.kron import gradient_factor, input_factor, split_solve, tikhonov_solve
from tests.support.recording import recording
from tests.support.settings import DAMPING, EVERY_STEP

BATCH = 4

# torch's own remark on even kernels with padding="same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


class Flat(nn.Module):
    """Puts a module under the name "layer" into a model that answers with one row an example."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).flatten(1)


class Conv1D(nn.Module):
    """A module written to the interface of Transformers' class of this name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def loss_of(outputs: Tensor) -> Tensor:
    """Return a mean over examples whose gradients differ from example to example."""
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)
    return (outputs * weights + outputs.square()).sum() / len(outputs)


def stepped(model: nn.Module, *inputs: Tensor, **options) -> kaisa.KFACPreconditioner:
    model.zero_grad()
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, **options})
    loss_of(model(*inputs)).backward()
    kfac.step()
    return kfac


def raw_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    loss = loss_of(model(*inputs))
    return [gradient.clone() for gradient in torch.autograd.grad(loss, list(model.parameters()))]


def treatment_of(kfac: kaisa.KFACPreconditioner, name: str) -> str:
    [row] = [row for row in kfac.coverage() if row.name == name]
    return row.treatment


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear_without_bias": (lambda: nn.Linear(3, 4, bias=False), (3,)),
    "linear_one_leading_dimension": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear_three_leading_dimensions": (lambda: nn.Linear(3, 2), (2, 3, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 8)),
    "conv1d_circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "conv2d_no_bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 6, 5)),
    "conv2d_1x1": (lambda: nn.Conv2d(3, 4, 1), (3, 4, 4)),
    "conv2d_1x1_strided": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 5, 4)),
    "conv2d_strided": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1), (2, 7, 6)),
    "conv2d_stride_beyond_kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 8, 7)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), (2, 5, 6)),
    "conv2d_same_even_dilated": (lambda: nn.Conv2d(2, 2, 4, padding="same", dilation=2), (2, 8, 9)),
    "conv2d_valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 6)),
    "conv2d_wide_padding": (lambda: nn.Conv2d(2, 3, 3, padding=(3, 4)), (2, 3, 4)),
    "conv2d_dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=(2, 3), padding=2), (2, 9, 8)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5, 6)),
    "conv2d_replicate": (
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="replicate"),
        (2, 6, 5),
    ),
    "conv2d_same_circular": (
        lambda: nn.Conv2d(2, 3, (3, 4), padding="same", padding_mode="circular"),
        (2, 6, 5),
    ),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5)),
    "conv2d_depthwise_multiplied": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1), (2, 4, 5, 3)),
    "conv3d_groups": (lambda: nn.Conv3d(4, 4, 2, groups=2, bias=False), (4, 3, 4, 3)),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, padding=1, output_padding=2),
        (3, 5),
    ),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), (3, 4, 3)),
    "conv_transpose2d_dilated": (
        lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=False),
        (2, 4, 3),
    ),
    "conv_transpose2d_groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 3, 3)),
    "transformers_conv1d": (lambda: Conv1D(4, 3), (5, 3)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[request.param]
    return Flat(build()).double(), torch.randn(BATCH, *shape, dtype=torch.float64)


def by_group(factor: Tensor, groups: int) -> list[Tensor]:
    return list(factor) if factor.ndim == 3 else [factor] * groups


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_and_preconditioned_gradient_are_those_of_the_definition(
    case: tuple[nn.Module, Tensor], sharing: str
) -> None:
    model, x = case
    with recording(model, ["layer"]) as records:
        loss_of(model(x)).backward()
        expected = records["layer"].pairs(sharing=sharing)
    raw = gradient_matrix(model.layer).clone()
    kfac = stepped(model, x, sharing=sharing)
    found = kfac.factors["layer"]
    groups = len(expected)
    for index, (a, g) in enumerate(expected):
        torch.testing.assert_close(by_group(found.a, groups)[index], a)
        torch.testing.assert_close(by_group(found.g, groups)[index], g)
    solved = [tikhonov_solve(a, g, raw[i], DAMPING) for i, (a, g) in enumerate(expected)]
    torch.testing.assert_close(gradient_matrix(model.layer), torch.stack(solved))


def test_cholesky_preconditions_every_layer_by_the_split_damping(
    case: tuple[nn.Module, Tensor],
) -> None:
    model, x = case
    with recording(model, ["layer"]) as records:
        loss_of(model(x)).backward()
        expected = records["layer"].pairs()
    raw = gradient_matrix(model.layer).clone()
    stepped(model, x, solver="cholesky")
    solved = [split_solve(a, g, raw[i], DAMPING) for i, (a, g) in enumerate(expected)]
    torch.testing.assert_close(gradient_matrix(model.layer), torch.stack(solved))


def test_all_parameters_of_a_supported_layer_are_covered(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    kfac = stepped(model, x)
    assert kfac.coverage().share == 1.0
    assert sum(row.parameters for row in kfac.coverage()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 4), lambda: nn.Conv2d(3, 4, 1)])
def test_a_frozen_parameter_stays_without_gradient(build, frozen: str) -> None:
    layer = build()
    getattr(layer, frozen).requires_grad_(False)
    model = nn.Sequential(Flat(layer), nn.Linear(4, 2)).double()
    x = torch.randn(BATCH, 3, *([1, 1] if isinstance(layer, nn.Conv2d) else []), dtype=torch.float64)
    stepped(model, x)
    assert getattr(model[0].layer, frozen).grad is None


def test_a_layer_with_a_frozen_bias_is_preconditioned_as_one_without() -> None:
    model = Flat(nn.Linear(3, 4)).double()
    model.layer.bias.requires_grad_(False)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    loss_of(model(x)).backward()
    raw = model.layer.weight.grad.clone()
    kfac = stepped(model, x)
    assert kfac.factors["layer"].a.shape == (3, 3)
    pair = kfac.factors["layer"]
    expected = tikhonov_solve(pair.a, pair.g, raw, DAMPING)
    torch.testing.assert_close(model.layer.weight.grad, expected)


def test_a_model_with_all_parameters_frozen_but_one_layer_preconditions_that_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    kfac = stepped(model, torch.randn(BATCH, 3, dtype=torch.float64))
    assert list(kfac.factors) == ["2"]


class Tokens(nn.Module):
    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=padding_idx)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens)).flatten(1)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_an_embedding_is_a_linear_layer_of_one_hot_rows(padding_idx: int | None) -> None:
    model = Tokens(padding_idx).double()
    tokens = torch.randint(0, 7, (BATCH, 5))
    with recording(model, ["embedding"]) as records:
        loss_of(model(tokens)).backward()
    raw = model.embedding.weight.grad.t().clone()
    rows = F.one_hot(tokens, 7).double()
    gradients = records["embedding"].gradients[0]
    if padding_idx is not None:
        rows = rows * (tokens != padding_idx)[..., None]
        gradients = gradients * (tokens != padding_idx)[..., None]
    a, g = input_factor(rows), gradient_factor(gradients, BATCH)
    torch.testing.assert_close(a, torch.diag(torch.diag(a)))
    kfac = stepped(model, tokens)
    torch.testing.assert_close(kfac.factors["embedding"].a, torch.diag(a))
    torch.testing.assert_close(kfac.factors["embedding"].g, g)
    expected = tikhonov_solve(a, g, raw, DAMPING)
    torch.testing.assert_close(model.embedding.weight.grad.t(), expected)


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.inner = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.inner(self.embedding(tokens)))).flatten(1)


def test_a_weight_tied_to_an_embedding_is_preconditioned_once_with_both_uses() -> None:
    model = TiedModel().double()
    tokens = torch.randint(0, 7, (BATCH, 5))
    raw = raw_gradients(model, tokens)[0]
    kfac = stepped(model, tokens)
    owners = [name for name in kfac.factors if name in ("embedding", "decoder")]
    assert len(owners) == 1
    assert kfac.coverage().share == 1.0
    pair = kfac.factors[owners[0]]
    tokens_side, features_side = sorted(pair, key=lambda factor: -factor.shape[-1])
    assert tokens_side.ndim == 1
    expected = tikhonov_solve(features_side, tokens_side, raw, DAMPING)
    torch.testing.assert_close(model.embedding.weight.grad, expected)


def test_a_tied_weights_factors_keep_the_trace_of_both_uses() -> None:
    model = TiedModel().double()
    tokens = torch.randint(0, 7, (BATCH, 5))
    with recording(model, ["embedding", "decoder"]) as records:
        kfac = stepped(model, tokens)
    trace = torch.zeros((), dtype=torch.float64)
    one_hot = F.one_hot(tokens, 7).double()
    trace += input_factor(one_hot).trace() * gradient_factor(records["embedding"].gradients[0], BATCH).trace()
    [(a, g)] = records["decoder"].pairs()
    trace += a.trace() * g.trace()
    [owner] = [name for name in kfac.factors if name in ("embedding", "decoder")]
    pair = kfac.factors[owner]
    traces = [factor.sum() if factor.ndim == 1 else factor.trace() for factor in pair]
    torch.testing.assert_close(traces[0] * traces[1], trace)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer_norm_of_sequences": (lambda: nn.LayerNorm(5), (3, 5)),
    "layer_norm_of_two_dimensions": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(5, bias=False), (3, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), (3, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch_norm2d_without_statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        (4, 3, 2),
    ),
}


def norm_gradients(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Return (batch, positions, channels, 1 or 2): gradients of scale and shift by position."""
    state = {name: torch.full_like(parameter, float(name == "weight")) for name, parameter in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    normalized = functional_call(module, {**state, **buffers}, (x,)).detach()
    both = torch.stack([normalized * gradient, gradient], dim=-1)
    if getattr(module, "bias", None) is None:
        both = both[..., :1]
    channels = module.weight.numel()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return both.reshape(len(x), -1, channels, both.shape[-1])
    return both.reshape(len(x), channels, -1, both.shape[-1]).transpose(1, 2)


@pytest.mark.parametrize(("loss_terms", "chunk"), [(None, 2**16), (2 * BATCH, 2**16), (2 * BATCH, 16)])
@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_scale_and_shift_are_preconditioned_by_their_own_block_of_each_channel(
    kind: str, loss_terms: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loss an example: the exact block. A loss for each position: the positions as examples."""
    monkeypatch.setattr(norms, "_CHUNK", chunk)
    build, shape = NORMS[kind]
    model = Flat(build()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    with recording(model, ["layer"]) as records:
        raw = [gradient.reshape(-1) for gradient in raw_gradients(model, x)]
    rows = norm_gradients(model.layer, x, records["layer"].gradients[0])
    if loss_terms is None:
        rows = rows.sum(dim=1, keepdim=True)
    kfac = stepped(model, x, loss_terms=loss_terms)
    assert "layer" in kfac.factors
    found = torch.stack([parameter.grad.reshape(-1) for parameter in model.parameters()], dim=-1)
    for channel in range(rows.shape[2]):
        block = gradient_factor(rows[:, :, channel], loss_terms or BATCH)
        damped = block + DAMPING * torch.eye(len(block), dtype=torch.float64)
        gradient = torch.stack([parameter[channel] for parameter in raw])
        torch.testing.assert_close(found[channel], torch.linalg.solve(damped, gradient))


def test_batch_norm_in_evaluation_mode_uses_its_running_statistics() -> None:
    model = Flat(nn.BatchNorm2d(4)).double()
    model(torch.randn(20, 4, 3, 2, dtype=torch.float64) * 3 + 1)
    model.eval()
    x = torch.randn(BATCH, 4, 3, 2, dtype=torch.float64)
    with recording(model, ["layer"]) as records:
        raw = raw_gradients(model, x)
    rows = norm_gradients(model.layer, x, records["layer"].gradients[0])
    rows = rows.sum(dim=1, keepdim=True)
    stepped(model, x)
    for channel in range(4):
        block = gradient_factor(rows[:, :, channel], BATCH)
        gradient = torch.stack([raw[0][channel], raw[1][channel]])
        damped = block + DAMPING * torch.eye(2, dtype=torch.float64)
        solved = torch.linalg.solve(damped, gradient)
        torch.testing.assert_close(model.layer.weight.grad[channel], solved[0])


class Twice(nn.Module):
    """One layer in two places of one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_a_module_used_twice_counts_both_uses_as_shared_positions() -> None:
    model = Twice().double()
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    with recording(model, ["layer"]) as records:
        loss_of(model(x)).backward()
    record = records["layer"]
    raw = gradient_matrix(model.layer)[0].clone()
    rows = torch.stack([F.pad(inputs, (0, 1), value=1.0) for inputs in record.inputs], dim=1)
    a = input_factor(rows)
    g = gradient_factor(torch.stack(record.gradients, dim=1), BATCH)
    kfac = stepped(model, x)
    torch.testing.assert_close(kfac.factors["layer"].a, a)
    torch.testing.assert_close(kfac.factors["layer"].g, g)
    torch.testing.assert_close(gradient_matrix(model.layer)[0], tikhonov_solve(a, g, raw, DAMPING))


class Optional(nn.Module):
    """A model one of whose branches is not taken in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, *, both: bool = False) -> Tensor:
        return self.sometimes(torch.tanh(self.always(x))) if both else self.always(x)


def test_a_module_that_a_step_did_not_use_is_left_alone() -> None:
    model = Optional().double()
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    loss_of(model(x)).backward()
    kfac.step()
    assert model.sometimes.weight.grad is None
    model.zero_grad()
    loss_of(model(x, both=True)).backward()
    raw = gradient_matrix(model.sometimes)[0].clone()
    kfac.step()
    pair = kfac.factors["sometimes"]
    solved = tikhonov_solve(pair.a, pair.g, raw, DAMPING)
    torch.testing.assert_close(gradient_matrix(model.sometimes)[0], solved)
    factors = [factor.clone() for factor in pair]
    model.zero_grad()
    loss_of(model(x)).backward()
    kfac.step()
    assert model.sometimes.weight.grad is None
    torch.testing.assert_close(list(kfac.factors["sometimes"]), factors)


class Scale(nn.Module):
    """A module of a type that the library has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_what_no_rule_covers_keeps_its_raw_gradient_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Scale()).double()
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    raw = raw_gradients(model, x)
    kfac = stepped(model, x)
    assert torch.equal(model[1].factor.grad, raw[2])
    assert not torch.allclose(model[0].weight.grad, raw[0])
    report = kfac.coverage()
    assert report.share == pytest.approx(15 / 18)
    [row] = [row for row in report if row.name == "1"]
    assert row.type == "Scale"
    assert row.parameters == 3
    assert "Scale" in str(report)
    assert "1" not in kfac.factors


def test_skipped_layers_keep_their_raw_gradient_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    raw = raw_gradients(model, x)
    kfac = stepped(model, x, skip_layers=("2",))
    assert list(kfac.factors) == ["0"]
    assert torch.equal(model[2].weight.grad, raw[2])
    assert kfac.coverage().share == pytest.approx(15 / 23)


def test_skip_layers_takes_class_names_as_kfac_pytorch_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2)).double()
    x = torch.randn(BATCH, 2, 1, 1, dtype=torch.float64)
    kfac = stepped(model, x, skip_layers=["Linear"])
    assert list(kfac.factors) == ["0"]


def test_a_side_as_large_as_a_vocabulary_needs_no_dense_factor() -> None:
    vocabulary = 64
    model = Flat(nn.Linear(4, vocabulary)).double()
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    with recording(model, ["layer"]) as records:
        loss_of(model(x)).backward()
    raw = gradient_matrix(model.layer)[0].clone()
    [(a, g)] = records["layer"].pairs()
    kfac = stepped(model, x, layer_options=LayerOptions(largest_dense=32))
    pair = kfac.factors["layer"]
    assert pair.g.numel() <= vocabulary * 32
    torch.testing.assert_close(pair.a, a)
    torch.testing.assert_close(pair.g, torch.diag(g))
    solved = tikhonov_solve(a, torch.diag(torch.diag(g)), raw, DAMPING)
    torch.testing.assert_close(gradient_matrix(model.layer)[0], solved)
    assert "diagonal" in treatment_of(kfac, "layer")


def test_an_input_as_large_as_a_vocabulary_needs_no_dense_factor() -> None:
    model = Flat(nn.Linear(64, 4)).double()
    x = torch.randn(BATCH, 64, dtype=torch.float64)
    with recording(model, ["layer"]) as records:
        loss_of(model(x)).backward()
    raw = gradient_matrix(model.layer)[0].clone()
    [(a, g)] = records["layer"].pairs()
    stepped(model, x, layer_options=LayerOptions(largest_dense=32))
    solved = tikhonov_solve(torch.diag(torch.diag(a)), g, raw, DAMPING)
    torch.testing.assert_close(gradient_matrix(model.layer)[0], solved)


def test_a_subclass_of_a_supported_module_that_may_compute_something_else_is_not_touched() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 4)).double()
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    raw = raw_gradients(model, x)
    kfac = stepped(model, x)
    assert list(kfac.factors) == ["0"]
    assert torch.equal(model[1].weight.grad, raw[2])


class Rescaled(nn.Module):
    """A user's own module: a linear map with the inputs divided by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x / 2) @ self.kernel.t()


class RescaledLayer(MatrixLayer):
    """What a user writes so that `Rescaled` is preconditioned."""

    def __init__(self, name: str, module: Rescaled, options: LayerOptions) -> None:
        super().__init__(name, module, module.kernel, None, options)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, x.shape[-1]) / 2

    def output_rows(self, delta: Tensor) -> Tensor:
        return delta.reshape(delta.shape[0], -1, delta.shape[-1])


def test_a_users_own_module_type_can_be_registered() -> None:
    model = Flat(Rescaled()).double()
    x = torch.randn(BATCH, 5, 3, dtype=torch.float64)
    register(Rescaled, RescaledLayer)
    with recording(model, ["layer"]) as records:
        raw = raw_gradients(model, x)[0]
    a, g = input_factor(x / 2), gradient_factor(records["layer"].gradients[0], BATCH)
    kfac = stepped(model, x)
    assert kfac.coverage().share == 1.0
    torch.testing.assert_close(list(kfac.factors["layer"]), [a, g])
    torch.testing.assert_close(model.layer.kernel.grad, tikhonov_solve(a, g, raw, DAMPING))


def test_a_layer_without_a_batch_dimension_is_a_batch_of_one() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = torch.randn(3, dtype=torch.float64)
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    model(x).square().sum().backward()
    kfac.step()
    row = torch.cat([x, torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(kfac.factors["0"].a, torch.outer(row, row))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_have_factors_of_single_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    kfac = kaisa.KFACPreconditioner(model, **{**EVERY_STEP, "factor_dtype": None, "inv_dtype": torch.float32})
    loss_of(model(torch.randn(BATCH, 3).to(dtype))).backward()
    kfac.step()
    for parameter in model.parameters():
        assert parameter.grad.dtype == dtype
        assert torch.isfinite(parameter.grad).all()
    assert {factor.dtype for pair in kfac.factors.values() for factor in pair} == {torch.float32}


def test_two_linear_modules_that_share_all_parameters_are_one_layer_with_two_uses() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.Tanh(), second).double()
    once = Twice().double()
    once.layer.load_state_dict(first.state_dict())
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    kfac, other = stepped(model, x), stepped(once, x)
    assert list(kfac.factors) == ["0"]
    torch.testing.assert_close(list(kfac.factors["0"]), list(other.factors["layer"]))
    torch.testing.assert_close(first.weight.grad, once.layer.weight.grad)


def test_a_weight_computed_from_another_parameter_is_left_to_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    raw = dict(zip(dict(model.named_parameters()), raw_gradients(model, x), strict=True))
    kfac = stepped(model, x)
    assert list(kfac.factors) == ["1"]
    assert torch.equal(model[0].weight_orig.grad, raw["0.weight_orig"])
    assert torch.equal(model[0].bias.grad, raw["0.bias"])
