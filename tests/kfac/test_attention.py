"""`nn.MultiheadAttention`, whose submodules are never called, is its four projections to K-FAC."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kaisa
from tests.support.attention import (
    UnpackedAttention,
    as_called,
    attention_inputs,
    unpacked_parameters,
)
from tests.support.kron import tikhonov_solve
from tests.support.recording import recording
from tests.support.settings import DAMPING, EVERY_STEP

BATCH = 3
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]

CASES = [
    pytest.param({"batch_first": True}, "self", id="self"),
    pytest.param({"batch_first": False}, "self", id="self-length-first"),
    pytest.param({"batch_first": True, "bias": False}, "self", id="self-without-bias"),
    pytest.param({"batch_first": True}, "cross", id="cross"),
    pytest.param({"batch_first": False}, "cross", id="cross-length-first"),
    pytest.param({"batch_first": True, "kdim": 3, "vdim": 2}, "cross", id="cross-kdim-vdim"),
    pytest.param({"batch_first": False, "kdim": 3, "bias": False}, "cross", id="cross-kdim"),
]


class Attending(nn.Module):
    """Holds the packed module as "attention" and answers one row an example."""

    def __init__(self, packed: nn.MultiheadAttention, **options: bool) -> None:
        super().__init__()
        self.attention, self.options = packed, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return as_called(self.attention, query, key, value, **self.options).flatten(1)


def loss_of(outputs: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)
    return (outputs * weights + outputs.square()).sum() / len(outputs)


def attending(options: dict, **calls: bool) -> Attending:
    return Attending(nn.MultiheadAttention(4, 2, **options).double(), **calls)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("options", "kind"), CASES)
def test_outputs_and_gradients_are_the_same_with_kfac_attached(options: dict, kind: str, need_weights: bool) -> None:
    model = attending(options, need_weights=need_weights)
    inputs = attention_inputs(model.attention, kind, BATCH)
    expected = model(*inputs)
    loss_of(expected).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP):
        outputs = model(*inputs)
        loss_of(outputs).backward()
        assert torch.equal(outputs, expected)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
    assert "forward" not in vars(model.attention)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("options", "kind"), CASES)
def test_its_projections_are_preconditioned_as_four_linear_layers(options: dict, kind: str, need_weights: bool) -> None:
    model = attending(options, need_weights=need_weights)
    inputs = attention_inputs(model.attention, kind, BATCH)
    unpacked = UnpackedAttention(model.attention)
    with recording(unpacked, PARTS) as records:
        loss_of(unpacked(*inputs).flatten(1)).backward()

    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    loss_of(model(*inputs)).backward()
    kfac.step()

    assert sorted(kfac.factors) == sorted(f"attention.{part}" for part in PARTS)
    assert kfac.coverage().share == 1.0
    found = unpacked_parameters(model.attention, grads=True)
    for part in PARTS:
        [(a, g)] = records[part].pairs()
        torch.testing.assert_close(kfac.factors[f"attention.{part}"].a, a)
        torch.testing.assert_close(kfac.factors[f"attention.{part}"].g, g)
        linear = unpacked.get_submodule(part)
        raw = linear.weight.grad
        if linear.bias is not None:
            raw = torch.cat([raw, linear.bias.grad[:, None]], dim=1)
        solved = tikhonov_solve(a, g, raw, DAMPING)
        torch.testing.assert_close(found[f"{part}.weight"], solved[:, : linear.in_features])
        if linear.bias is not None:
            torch.testing.assert_close(found[f"{part}.bias"], solved[:, -1])


def test_dropout_draws_the_same_random_numbers_with_kfac_attached() -> None:
    packed = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    model = Attending(packed)
    inputs = attention_inputs(packed, "self", BATCH)
    torch.manual_seed(7)
    expected = model(*inputs)
    with kaisa.KFACPreconditioner(model, **EVERY_STEP):
        torch.manual_seed(7)
        assert torch.equal(model(*inputs), expected)


def test_masks_are_taken_as_before() -> None:
    model = attending({"batch_first": True})
    query, _, _ = attention_inputs(model.attention, "self", BATCH)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(BATCH, 5, dtype=torch.float64)
    padding[1, 3:] = -torch.inf

    def call() -> Tensor:
        return model.attention(query, query, query, attn_mask=mask, key_padding_mask=padding)[0]

    expected = call()
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        outputs = call()
        assert torch.equal(outputs, expected)
        loss_of(outputs.flatten(1)).backward()
        kfac.step()
        assert len(kfac.factors) == 4


def test_a_transformer_encoder_layer_is_covered_whole() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    twin = copy.deepcopy(model)
    x = torch.randn(BATCH, 5, 4, dtype=torch.float64)
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        assert kfac.coverage().share == 1.0
        outputs = model(x)
        torch.testing.assert_close(outputs, twin(x))
        loss_of(outputs.flatten(1)).backward()
        kfac.step()
        assert len(kfac.factors) == 8
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_with_a_frozen_packed_weight_the_output_projection_is_still_preconditioned() -> None:
    model = attending({"batch_first": True})
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(False)
    inputs = attention_inputs(model.attention, "self", BATCH)
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    loss_of(model(*inputs)).backward()
    kfac.step()
    assert list(kfac.factors) == ["attention.out_proj"]
    assert model.attention.in_proj_weight.grad is None


def test_two_preconditioners_on_one_module_do_not_take_each_others_hooks() -> None:
    model = attending({"batch_first": True})
    inputs = attention_inputs(model.attention, "self", BATCH)
    first = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    second = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    loss_of(model(*inputs)).backward()
    first.step()
    second.step()
    for name, pair in first.factors.items():
        torch.testing.assert_close(list(second.factors[name]), list(pair))
    assert len(first.factors) == len(second.factors) == 4
    first.close()
    second.close()
    assert "forward" not in vars(model.attention)


def test_a_forward_that_the_user_has_put_in_place_stays_and_is_not_watched() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 1)}).double()
    attention, calls = model["attention"], []
    plain = attention.forward

    def counted(*args: Tensor, **kwargs: object) -> object:
        calls.append("forward")
        return plain(*args, **kwargs)

    attention.forward = counted
    with kaisa.KFACPreconditioner(model, **EVERY_STEP) as kfac:
        reasons = {row.name: row.treatment for row in kfac.coverage() if not row.covered}
        x = torch.randn(3, 2, 4, dtype=torch.float64)
        model["head"](attention(x, x, x)[0]).sum().backward()
        kfac.step()
        assert set(kfac.factors) == {"head"}
    assert reasons["attention"] == "its forward is replaced by one of the user's"
    assert calls == ["forward"]
    assert attention.forward is counted


def test_attention_is_seen_under_a_default_device() -> None:
    model = attending({"batch_first": True})
    kfac = kaisa.KFACPreconditioner(model, **EVERY_STEP)
    with torch.device("cpu"):
        loss_of(model(*attention_inputs(model.attention, "self", BATCH))).backward()
    assert set(kfac._capture.take()) == {f"attention.{part}" for part in PARTS}
