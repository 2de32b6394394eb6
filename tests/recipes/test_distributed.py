"""What is told of a placement by formula is what ranks measure; parts of a batch make the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import kaisa
from kaisa.commands.processes import agreed
from kaisa.errors import ConfigurationError, DataError, KaisaError
from kaisa.kfac import solvers
from kaisa.kfac.account import Account, Sent, Sizes, account
from kaisa.kfac.collectives import Alone, Collectives
from kaisa.kfac.payload import Payload
from kaisa.kfac.placement import FactorShape, LayerShape, place
from kaisa.kfac.routes import Routes
from kaisa.recipes.batches import ImageBatches
from kaisa.recipes.distributed import (
    account_of,
    build_accounts,
    describe_account,
    layer_shapes,
    numbers_held_by,
    summarize_account,
)
from tests.support.world import Simulated, run

WORLDS = [(world, workers) for world in (1, 2, 4, 8) for workers in (1, 2, 4, 8) if workers <= world]
SOLVERS = ("eigen", "cholesky", "ekfac")


def small_model() -> nn.Module:
    """Plain and grouped convolutions, normalisation, a diagonal factor, and sizes that no rank count divides."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(96, 7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    )


def measure(ranks: Collectives, model: nn.Module, workers: int, solver: str) -> tuple[dict[str, Sent], dict[str, int]]:
    """Return what a rank sent in a factor step that decomposes too, and what it holds."""
    kfac = kaisa.KFACPreconditioner(
        model,
        factor_update_steps=1,
        inv_update_steps=1,
        lr=0.1,
        solver=solver,
        grad_worker_fraction=workers / ranks.world_size,
        collectives=ranks,
        payload=Payload(bucket_bytes=1000, deferred=False),
    )
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(ranks.rank))
    for _ in range(2):  # of which the second is like all others
        bytes_before, calls_before = Counter(ranks.bytes_sent), Counter(ranks.calls)
        functional.cross_entropy(model(inputs), torch.arange(8) % 3).backward()
        kfac.step()
    sent = {
        kind: Sent(ranks.bytes_sent[kind] - bytes_before[kind], ranks.calls[kind] - calls_before[kind])
        for kind in ranks.calls
        if ranks.calls[kind] > calls_before[kind]
    }
    held = {kind: size for kind, size in kfac.memory_usage().items() if kind != "statistics"}
    return sent, held


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize(("world", "workers"), WORLDS)
def test_the_formulas_are_what_ranks_send_and_hold(
    monkeypatch: pytest.MonkeyPatch, world: int, workers: int, is_sliced: bool, solver: str
) -> None:
    if is_sliced:
        for module in ("routes", "transport", "account"):
            monkeypatch.setattr(f"kaisa.kfac.{module}.is_worth_slicing", lambda shares: True)
    model = small_model()
    results = run(world, lambda ranks: measure(ranks, deepcopy(model), workers, solver))
    shapes = layer_shapes(small_model)
    told = account(
        place(shapes, world, workers),
        shapes,
        numbers_held_by(solvers.named(solver)),
        sizes=Sizes(bucket=1000),
        has_moments=solver == "ekfac",
        damps_factors=solver == "cholesky",
    )
    for rank, (sent, held) in enumerate(results):
        assert sent == {**told.factor_step[rank], **told.inverse_step[rank], **told.every_step[rank]}
        assert {**held, "statistics": 0} == told.memory[rank]


@pytest.mark.parametrize("world", [2, 4])
def test_what_waits_on_a_rank_is_in_the_formulas(world: int) -> None:
    whole = small_model()

    def waiting(ranks: Simulated) -> tuple[int, Counter[str]]:
        model = deepcopy(whole)
        kfac = kaisa.KFACPreconditioner(model, factor_update_steps=1, lr=0.1, collectives=ranks)
        inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(ranks.rank))
        for _ in range(2):
            calls_before = Counter(ranks.calls)
            functional.cross_entropy(model(inputs), torch.arange(8) % 3).backward()
            kfac.step()
        return kfac.memory_usage()["statistics"], Counter(ranks.calls) - calls_before

    shapes = layer_shapes(small_model)
    told = account(place(shapes, world, world), shapes, numbers_held_by(solvers.named("eigen")), deferred=True)
    for rank, (held, calls) in enumerate(run(world, waiting)):
        assert held == told.memory[rank]["statistics"] > 0
        assert calls == Counter()
        assert told.factor_step[rank] == {}
        assert told.inverse_step[rank]["statistics"].bytes > 0


def totals(figures: Account, part: str, kind: str) -> int:
    return sum(sent[kind].bytes for sent in getattr(figures, part) if kind in sent)


def test_memory_falls_and_the_traffic_of_a_step_rises_from_comm_to_mem() -> None:
    accounts = build_accounts("resnet20", 8)
    assert [figures.placement.fraction for figures in accounts] == [1, 0.5, 0.25, 0.125]
    held = [sum(rank["total"] for rank in figures.memory) for figures in accounts]
    assert held == sorted(held, reverse=True)
    sent = [totals(figures, "every_step", "gradients") for figures in accounts]
    assert sent == sorted(sent)
    assert sent[0] == 0


def test_the_factors_are_held_once_whatever_the_fraction() -> None:
    for figures in build_accounts("cnn", 6):
        total = sum(rank["factors"] for rank in figures.memory)
        assert total == sum(rank["factors"] for rank in build_accounts("cnn", 1)[0].memory)


def test_one_rank_sends_nothing() -> None:
    (figures,) = build_accounts("mlp", 1)
    assert (figures.factor_step, figures.inverse_step, figures.every_step) == (({},), ({},), ({},))


def test_a_hand_made_layer_is_counted_by_hand() -> None:
    shapes = [LayerShape("layer", FactorShape(3), FactorShape(2), (1, 2, 3))]
    figures = account(place(shapes, 2, 1), shapes, lambda shape: shape.size + shape.size**2)
    assert figures.factor_step[0]["statistics"] == Sent(8 * 4, 1)
    assert figures.factor_step[1]["statistics"] == Sent(8 * 4 + 4 * (6 + 3), 1)
    assert figures.every_step[0]["gradients"] == Sent(4 * 6, 1)
    assert figures.every_step[1]["gradients"] == Sent(0, 1)
    assert figures.memory[0] == {
        "factors": 4 * 13,
        "decompositions": 4 * 18,
        "moments": 0,
        "statistics": 0,
        "total": 4 * 31,
    }
    assert figures.memory[1]["total"] == 0


@pytest.mark.parametrize(("bucket", "messages"), [(1, 3), (100, 2), (10_000, 1)])
def test_messages_are_filled_from_the_last_layer_on(bucket: int, messages: int) -> None:
    shapes = [LayerShape(str(index), FactorShape(4), FactorShape(2), (1, 2, 4)) for index in range(3)]
    routes = Routes(place(shapes, 2, 1), tuple(shapes), bucket)
    assert [name for names in routes.statistics_buckets for name in names] == ["2", "1", "0"]
    assert len(routes.statistics_buckets) == messages


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20", "resnet32", "bert-base"])
def test_every_model_has_a_table_for_every_fraction(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for figures in build_accounts(model, 4):
        describe_account(figures, Console(highlight=False))
        assert summarize_account(figures)["fraction"] == figures.placement.fraction
    said = capsys.readouterr().out
    assert [name in said for name in ("COMM-OPT", "HYBRID-OPT", "MEM-OPT")] == [True] * 3
    assert "| 0 1 |\n| 2 3 |" in said


def test_bert_has_the_factors_of_its_linear_layers() -> None:
    figures = account_of(layer_shapes(lambda: nn.Linear(768, 3072)), 1, 1, solvers.named("cholesky"))
    assert figures.memory[0]["factors"] == 4 * (769**2 + 3072**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", 8), "unknown model 'vgg'"),
        (("cnn", 0), "world-size is 0"),
        (("cnn", 2, "qr"), "qr"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_accounts(*arguments)


def test_the_parts_of_all_ranks_are_the_batches_of_one(batches: ImageBatches) -> None:
    def joined(pick: Callable[[tuple[Tensor, Tensor]], Tensor]) -> list[Tensor]:
        parts = [[pick(batch) for batch in replace(batches, rank=rank, ranks=2).epoch(1)] for rank in range(2)]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    whole = list(batches.epoch(1))
    assert all(map(torch.equal, joined(lambda batch: batch[0]), [inputs for inputs, _ in whole]))
    assert all(map(torch.equal, joined(lambda batch: batch[1]), [labels for _, labels in whole]))


def test_two_processes_resume_to_the_bit_and_send_and_hold_what_is_told(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.support.two_ranks", str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    noisy, (first, second) = results.pop("few bits")
    assert noisy  # with the rounding noise of each rank, which is
    assert set(first).isdisjoint(second)  # its own
    assert sorted(results) == ["0.5", "1.0"]
    for resumed, measured, told in results.values():
        assert resumed
        assert measured == told
        assert measured[0]


def test_a_refusal_of_one_rank_is_said_once_and_ends_all() -> None:
    def prepare(ranks: Collectives) -> str:
        if ranks.rank > 0:
            raise DataError("no such folder")
        return "prepared"

    def outcome(ranks: Collectives) -> str:
        with pytest.raises(KaisaError) as caught:
            agreed(ranks, lambda: prepare(ranks))
        return type(caught.value).__name__

    assert run(3, outcome) == ["RefusedElsewhere", "DataError", "RefusedElsewhere"]
    assert agreed(Alone(), lambda: prepare(Alone())) == "prepared"
