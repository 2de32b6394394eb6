"""Training in few bits beside what else trains: optimizers, K-FAC, several ranks, mixed precision, the compiler."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kaisa
from kaisa.optim import ARSG, RSG, AdaHessian
from kaisa.quantize import QuantConfig, allocate_bits, convert, prepare, quantized_layers, ranges_of
from kaisa.recipes.language_models import Gpt2, Width


class Network(nn.Module):
    """A convolution, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mT
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(y.mean(1))


@pytest.fixture
def model() -> nn.Module:
    return Network()


def batch(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 2, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x.mean((1, 2)) * 8).long() % 4


def loss_of(model: nn.Module) -> Tensor:
    x, labels = batch()
    return F.cross_entropy(model(x), labels)


# ---------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.02),
    "rsg": lambda parameters: RSG(parameters, lr=1.0),
    "arsg": lambda parameters: ARSG(parameters, lr=0.02),
    "adahessian": lambda parameters: AdaHessian(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_in_few_bits(model: nn.Module, name: str) -> None:
    prepare(model, QuantConfig(gradient_bits=5))
    optimizer, first = OPTIMIZERS[name](model.parameters()), loss_of(model).item()
    for _ in range(60):
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = loss_of(model)
        optimizer.backward(loss) if isinstance(optimizer, AdaHessian) else loss.backward()
        optimizer.step()
    assert loss_of(model).item() < 0.7 * first


def test_the_hessian_is_that_of_the_float_model_where_nothing_is_rounded(model: nn.Module) -> None:
    def product(own: nn.Module) -> tuple[Tensor, ...]:
        own.double()
        x, labels = batch()
        parameters = list(own.parameters())
        loss = F.cross_entropy(own.head(own.conv(x.double()).tanh().mT.mean(1)), labels)
        used = [p for p in parameters if p is not own.attention.in_proj_weight][:2]
        gradients = torch.autograd.grad(loss, used, create_graph=True)
        return torch.autograd.grad(gradients, used, [torch.ones_like(g) for g in gradients])

    bits = dict.fromkeys(("activation_bits", "weight_bits", "bias_bits", "gradient_bits", "weight_gradient_bits"))
    other = prepare(copy.deepcopy(model), QuantConfig(**bits))
    torch.testing.assert_close(product(other), product(model), rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- K-FAC


def factors_of(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return what K-FAC covers of a model, and its factors after a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kfac = kaisa.KFACPreconditioner(model, optimizer, factor_update_steps=1, inv_update_steps=1)
    loss_of(model).backward()
    kfac.step()
    rows = [(row.name, row.treatment, row.covered) for row in kfac.coverage()]
    factors = {name: kfac.factors[name] for name in kfac.factors}
    kfac.close()
    return str(rows), factors


def test_kfac_covers_a_prepared_model_as_the_float_model(model: nn.Module) -> None:
    expected, _ = factors_of(copy.deepcopy(model))
    assert factors_of(prepare(model))[0] == expected


@pytest.mark.parametrize("mode", ["exact", "qat", "fqt"])
def test_factors_are_those_of_inputs_and_gradients_before_they_are_rounded(model: nn.Module, mode: str) -> None:
    other = copy.deepcopy(model)
    bits = {} if mode == "exact" else dict.fromkeys(("activation_bits", "weight_bits", "bias_bits"))
    if mode == "fqt":  # the last layer's gradient is rounded by nobody before it
        bits |= {"gradient_bits": {}, "weight_gradient_bits": 2}
    prepare(other, QuantConfig(mode=mode, **bits))
    _, expected = factors_of(model)
    _, found = factors_of(other)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(found[name].a, pair.a)
        torch.testing.assert_close(found[name].g, pair.g)


def test_kfac_preconditions_the_gradients_of_few_bits(model: nn.Module) -> None:
    prepare(model, QuantConfig(gradient_bits=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # With momentum and the usual damping the noise of 4 bits decides: two of three seeds end above the limit. Like this
    # each of 20 seeds falls to 0.44 of the first loss or less.
    kfac = kaisa.KFACPreconditioner(model, optimizer, factor_update_steps=1, inv_update_steps=2, damping=0.03)
    first = loss_of(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        kfac.step()
        optimizer.step()
    assert loss_of(model).item() < 0.7 * first


def test_a_tied_prediction_is_covered_as_in_float() -> None:
    model = Gpt2(Width(1, 8, 2, 16, 11, 5))
    rows = []
    for own in (copy.deepcopy(model), prepare(model)):
        kfac = kaisa.KFACPreconditioner(own, torch.optim.SGD(own.parameters(), 0.1))
        rows.append([(row.name, row.treatment) for row in kfac.coverage()])
        kfac.close()
    assert rows[0] == rows[1]
    assert ("wte", "diagonal A of tokens, dense G, from both uses") in rows[1]


# --------------------------------------------------------------------------------------------- wrappers and modes


def test_under_autocast_layers_compute_in_its_type(model: nn.Module) -> None:
    seen: list[torch.dtype] = []
    prepare(model).head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_of_16_bits_is_trained_in_fewer(model: nn.Module) -> None:
    prepare(model.bfloat16())
    x, labels = batch()
    F.cross_entropy(model(x.bfloat16()).float(), labels).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize(
    ("mode", "quantizer", "ranges"),
    [("qat", "bhq", "running"), ("fqt", "ptq", "batch"), ("fqt", "bhq", "running")],
)
def test_the_compiler_takes_the_whole_step(model: nn.Module, mode: str, quantizer: str, ranges: str) -> None:
    prepare(model, QuantConfig(mode=mode, quantizer=quantizer, gradient_bits=4, ranges=ranges))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = batch()
    results = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(1)
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    for own, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(own, expected)
        assert expected.norm() > 1e-3


def test_what_is_recomputed_in_the_backward_pass_gives_the_same_gradients(model: nn.Module) -> None:
    prepare(model, QuantConfig(mode="qat", ranges="batch"))
    x, _ = batch()
    found = []
    for run in (model, lambda value: checkpoint(model, value, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_micro_batches_add_up(model: nn.Module) -> None:
    prepare(model, QuantConfig(mode="qat", activation_bits=None))
    x, _ = batch()
    model(x).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in x.split(4):
        model(part).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], whole)


# --------------------------------------------------------------------------------------------------- many ranks


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)
    float_model = Network()
    torch.manual_seed(rank)  # the noise of each rank is its own
    results = {}
    for mode in ("qat", "fqt"):
        model = DistributedDataParallel(prepare(copy.deepcopy(float_model), QuantConfig(mode=mode)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(2):
            optimizer.zero_grad()
            x, labels = batch(2 * step + rank, 6)
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        names = list(quantized_layers(model))
        x, _ = batch(9)
        outputs = model.eval()(x).detach()  # with the running ranges of the first rank, which buffers come from
        results[mode] = (names, [p.detach().clone() for p in model.parameters()], outputs, ranges_of(model))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_keep_one_model_and_one_set_of_ranges(tmp_path: Path) -> None:
    multiprocessing.start_processes(_train, (str(tmp_path),), nprocs=2, join=True, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for mode in ("qat", "fqt"):
        names, parameters, outputs, _ = first[mode]
        assert names == ["conv", "attention", "head"]
        assert all(torch.equal(a, b) for a, b in zip(parameters, second[mode][1], strict=True))
        torch.testing.assert_close(outputs, second[mode][2])
    by_hand = _mean_of_gradients()
    torch.testing.assert_close(first["qat"][1], by_hand)
    assert not torch.equal(first["fqt"][1][0], first["qat"][1][0])


def _mean_of_gradients() -> list[Tensor]:
    """Return the parameters after two steps with the mean of both ranks' gradients."""
    torch.manual_seed(0)
    model = prepare(Network(), QuantConfig(mode="qat"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            x, labels = batch(2 * step + rank, 6)
            (F.cross_entropy(model(x), labels) / 2).backward()
        optimizer.step()
    return list(model.parameters())


class Holder(nn.Module):
    """Holds a model by names that wrappers use too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self._orig_mod = model, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(self.module(x))


def test_names_leave_out_wrappers_and_nothing_else(model: nn.Module) -> None:
    holder = Holder(model)
    own = ["module.conv", "module.attention", "module.head", "_orig_mod"]
    assert list(quantized_layers(prepare(holder))) == own
    holder.module = torch.compile(CheckpointWrapper(convert(model)), backend="eager")
    assert list(quantized_layers(prepare(nn.DataParallel(holder)))) == own


def test_reports_and_bits_name_layers_as_preparing_does(model: nn.Module) -> None:
    wrapped = nn.DataParallel(Holder(model))
    bits = allocate_bits(wrapped, batch(), 5, kind="psq", bits=(4, 6), probes=1)
    assert list(bits) == ["module.conv", "module.attention", "module.head", "_orig_mod"]
    prepare(wrapped, QuantConfig(gradient_bits=bits))


def test_a_wrapped_model_is_prepared_and_converted_inside(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    assert list(quantized_layers(prepare(compiled))) == ["conv", "attention", "head"]
    assert type(convert(compiled)._orig_mod.head) is nn.Linear
