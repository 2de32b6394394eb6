"""A checkpoint continues a run on any number of ranks; a torn or foreign one is refused and the last good one stays."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kaisa
from kaisa.errors import CheckpointError, StateError
from kaisa.kfac import checkpoint
from tests.support.checkpoint_worker import Training
from tests.support.torchrun import torchrun
from tests.support.training import distance

STOP, END = 3, 5  # in float64; stopped between two decompositions
TOLERANCE = 1e-9  # relative, of parameters after two steps on another world: rounding, through a decomposition


def only_shard(path: Path) -> Path:
    (shard,) = path.glob("*.safetensors")
    return shard


@pytest.mark.parametrize("solver", ["eigen", "cholesky", "ekfac", "sqrt_ekfac", "warm_eigen"])
def test_a_resumed_run_is_bitwise_the_run_that_was_never_stopped(tmp_path: Path, solver: str) -> None:
    whole = Training(solver=solver).run(STOP)
    whole.save(tmp_path, {"epoch": 3, "shuffled": [(1, torch.arange(3)), torch.empty(0, 2)]})
    resumed = Training(solver=solver)
    extra = resumed.load(tmp_path)
    assert extra["epoch"] == 3
    assert torch.equal(extra["shuffled"][0][1], torch.arange(3))
    assert extra["shuffled"][1].shape == (0, 2)
    whole.run(END)
    resumed.run(END)
    for name, expected in whole.parameters().items():
        assert torch.equal(resumed.parameters()[name], expected), name
    for key, expected in whole.factors().items():
        assert torch.equal(resumed.factors()[key], expected), key


# ---------------------------------------------------------------------------------------------------------- many ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of runs that were stopped in one world and placement and went on in others."""
    folder = tmp_path_factory.mktemp("runs")
    mem, comm = {"grad_worker_fraction": "mem"}, {"grad_worker_fraction": "comm"}
    waiting = {**comm, "is_tied": False, "inv_update_steps": 4}  # stopped with two steps of statistics waiting
    Training().run(STOP).save(folder / "of_one")
    two = [
        {"name": "whole", "until": END, "options": mem},
        {"name": "stopped", "until": STOP, "options": mem, "save": str(folder / "of_two")},
        {"name": "same", "until": END, "options": mem, "load": str(folder / "of_two")},
        {"name": "fraction", "until": END, "options": comm, "load": str(folder / "of_two")},
        {"name": "wait_whole", "until": END, "options": waiting},
        {"name": "wait_stopped", "until": STOP, "options": waiting, "save": str(folder / "of_waiting")},
        {"name": "wait_same", "until": END, "options": waiting, "load": str(folder / "of_waiting")},
        {"name": "wait_mem", "until": END, "options": {**waiting, **mem}, "load": str(folder / "of_waiting")},
        {"name": "from_one", "until": END, "options": mem, "load": str(folder / "of_one")},
        {"name": "ekfac", "until": STOP, "options": {**mem, "solver": "ekfac"}, "save": str(folder / "ekfac_of_two")},
    ]
    with torchrun(folder, {"plans": two}, 2, worker="checkpoint_worker.py") as world:
        assert world.wait(300) == 0, world.log
    three = [{"name": "three", "until": END, "options": mem, "load": str(folder / "of_two")}]
    with torchrun(folder, {"plans": three}, 3, worker="checkpoint_worker.py") as world:
        assert world.wait(300) == 0, world.log
    return folder


def result(folder: Path, name: str, rank: int) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / f"{name}_{rank}.pt", weights_only=True)


def all_factors(folder: Path, name: str, ranks: int, kind: str = "begun") -> dict[str, Tensor]:
    """Returns the factors of all ranks, each from one of its owners."""
    return {key: factor for rank in range(ranks) for key, factor in result(folder, name, rank)[kind].items()}


def test_the_same_world_goes_on_to_the_bit(runs: Path) -> None:
    for rank in (0, 1):
        for kind in ("parameters", "factors"):
            found, expected = result(runs, "same", rank)[kind], result(runs, "whole", rank)[kind]
            assert found.keys() == expected.keys()
            for key in expected:
                assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize(("name", "ranks"), [("fraction", 2), ("three", 3)])
def test_another_world_or_fraction_has_the_same_factors_to_the_bit(runs: Path, name: str, ranks: int) -> None:
    expected = all_factors(runs, "stopped", 2, "factors")
    found = all_factors(runs, name, ranks)
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", ["fraction", "three", "from_one"])
def test_another_world_or_fraction_ends_with_the_same_parameters_but_for_rounding(runs: Path, name: str) -> None:
    expected = result(runs, "whole", 0)["parameters"]
    assert distance(result(runs, name, 0)["parameters"], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["wait_same", "wait_mem"])
def test_statistics_that_wait_are_in_the_checkpoint(runs: Path, name: str) -> None:
    expected = result(runs, "wait_whole", 0)["parameters"]
    assert distance(result(runs, name, 0)["parameters"], expected) < TOLERANCE
    alone = Training(is_tied=False, inv_update_steps=4).run(END)
    assert distance(alone.parameters(), expected) < TOLERANCE
    found = all_factors(runs, "wait_same", 2)
    before = Training(is_tied=False, inv_update_steps=4).run(STOP).factors()
    assert found.keys() == before.keys()
    assert all(torch.allclose(found[key], before[key], rtol=1e-10, atol=1e-12) for key in before)


def test_one_process_goes_on_from_two_ranks(runs: Path) -> None:
    alone = Training()
    alone.load(runs / "of_two")
    expected = all_factors(runs, "stopped", 2, "factors")
    assert alone.factors().keys() == expected.keys()
    assert all(torch.equal(alone.factors()[key], expected[key]) for key in expected)
    alone.run(END)
    assert distance(alone.parameters(), result(runs, "whole", 0)["parameters"]) < TOLERANCE


def test_corrected_eigenvalues_go_from_two_ranks_to_one(runs: Path) -> None:
    moved, alone = Training(solver="ekfac"), Training(solver="ekfac").run(STOP)
    moved.load(runs / "ekfac_of_two")
    moved.run(END)
    alone.run(END)
    assert distance(moved.parameters(), alone.parameters()) < TOLERANCE


def test_every_rank_writes_its_own_shard_and_no_factor_twice(runs: Path) -> None:
    path = checkpoint.latest(runs / "of_two")
    assert path is not None
    index = json.loads((path / "index.json").read_text())
    assert len(index["files"]) == 2
    names = [set(headers(path / file)) for file in sorted(index["files"])]
    assert not names[0] & names[1]
    for rank in (0, 1):
        owned = {f"factors/{key}" for key in result(runs, "stopped", rank)["factors"]}
        assert owned == {name for name in names[rank] if name.endswith(("/a", "/g"))}


def headers(shard: Path) -> list[str]:
    with shard.open("rb") as file:
        names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in names if name != "__metadata__"]


def test_the_state_of_a_rank_fits_the_same_rank_alone(tmp_path: Path) -> None:
    training = Training().run(STOP)
    state = training.kfac.state_dict()
    state["share"] = {**state["share"], "rank": 1, "world_size": 4}
    with pytest.raises(StateError, match=r"world_size: 4 in the state, 1 here \(kaisa\.kfac\.checkpoint goes from any"):
        training.kfac.load_state_dict(state)
    moved = {name: [[1], *rest] for name, (_, *rest) in training.kfac.state_dict()["share"]["assignments"].items()}
    state["share"] = {**training.kfac.state_dict()["share"], "assignments": moved}
    with pytest.raises(StateError, match=r"placement: convolution, grouped, .* are worked on by other ranks"):
        training.kfac.load_state_dict(state)


# ------------------------------------------------------------------------------------------------- torn and foreign


def missing(path: Path) -> None:
    only_shard(path).unlink()


def short(path: Path) -> None:
    os.truncate(only_shard(path), only_shard(path).stat().st_size - 1)


def altered(path: Path) -> None:
    data = bytearray(only_shard(path).read_bytes())
    data[-1] ^= 1
    only_shard(path).write_bytes(data)


@pytest.mark.parametrize(
    ("tear", "what"),
    [(missing, "is missing"), (short, "has the wrong length"), (altered, "was altered: its digest is another")],
)
def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_stays(tmp_path: Path, tear: Any, what: str) -> None:
    training = Training().run(1)
    first = training.save(tmp_path)
    second = training.run(2).save(tmp_path)
    tear(second)
    fresh = Training()
    before = fresh.parameters()
    with pytest.raises(CheckpointError, match=f"step_00000002 is torn: shard-00001.*{what}; complete are .*00000001"):
        fresh.load(second)
    assert fresh.kfac.steps == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in fresh.parameters().items())
    assert checkpoint.latest(tmp_path) == (second if tear is altered else first)
    fresh.load(first)
    assert fresh.kfac.steps == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "is not of the format 'kaisa.checkpoint/1'"),
        ('["a"]', "is not of the format"),
        (None, "has no index.json: it was never finished, or is no checkpoint"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = Training().run(1).save(tmp_path)
    (path / "index.json").unlink()
    if text is not None:
        (path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Training().load(path)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Training().load(tmp_path)


def test_a_shard_that_is_not_in_the_index_is_refused(tmp_path: Path) -> None:
    path = Training().run(1).save(tmp_path)
    (path / "zzz.safetensors").write_bytes(only_shard(path).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds files that are not its own: zzz\.safetensors"):
        Training().load(path)


def test_an_index_that_leaves_its_directory_is_refused(tmp_path: Path) -> None:
    path = Training().run(1).save(tmp_path)
    index = json.loads((path / "index.json").read_text())
    index["files"]["../outside.safetensors"] = [1, "00"]
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds files that are not its own"):
        Training().load(path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = Training().run(1).save(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["index.json", only_shard(path).name]


def test_the_checkpoint_of_another_model_optimizer_or_solver_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = Training().run(1).save(tmp_path)
    other = nn.Sequential(nn.Linear(2, 3)).double()
    optimizer = torch.optim.SGD([{"params": [p]} for p in other.parameters()], lr=0.1)
    kfac = kaisa.KFACPreconditioner(other, optimizer)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    groups = r"groups of \[\d+\] parameters in the checkpoint, of \[1, 1\] here"
    with pytest.raises(CheckpointError, match=rf"(?s)model: 0\.weight is missing.*optimizer: {groups}"):
        checkpoint.load(path, kfac, other, optimizer)
    with pytest.raises(CheckpointError, match="0: missing from the state"):
        checkpoint.load(path, kfac)
    assert all(torch.equal(old, new) for old, new in zip(before, other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="solver: Eigen"):
        Training(solver="cholesky").load(path)


def test_what_was_not_saved_cannot_be_loaded(tmp_path: Path) -> None:
    training = Training().run(1)
    path = checkpoint.save(tmp_path, training.kfac)
    with pytest.raises(CheckpointError, match="was written without the model"):
        training.load(path)


def test_an_extra_that_is_no_plain_value_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    training = Training().run(1)
    with pytest.raises(CheckpointError, match="extra/rows/0 is a set; a checkpoint holds numbers"):
        training.save(tmp_path, {"rows": [set()]})
    assert checkpoint.latest(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ at any moment


def test_the_last_two_stay_and_leftovers_go(tmp_path: Path) -> None:
    training = Training()
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "mine").mkdir()
    paths = [training.run(step).save(tmp_path) for step in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step_00000002", "step_00000003"]
    assert checkpoint.latest(tmp_path) == paths[-1]


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    training = Training().run(1)
    training.save(tmp_path, {"take": 1})
    training.save(tmp_path, {"take": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert Training().load(tmp_path) == {"take": 2}


def save_and_die(training: Training, directory: Path, moment: int) -> None:
    """Saves in a process of its own, which is killed at some access to the disk; writes how many there were if not."""
    accesses = 0
    kinds = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal accesses
        if event in kinds and f"{directory}/" in f"{arguments[0]}/":
            accesses += 1
            if accesses == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    training.save(directory)
    directory.with_suffix(".accesses").write_text(str(accesses))


def in_a_process(function: Callable[[], None]) -> int:
    """Returns the status of a copy of this process that does nothing else."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("step", [2, 3], ids=["of_the_same_step", "of_a_later_step"])
def test_whenever_a_process_is_killed_a_complete_checkpoint_is_there(tmp_path: Path, step: int) -> None:
    training = Training().run(1)
    for number in range(100):
        directory = tmp_path / str(number)
        for saved in (1, 2):
            first = Training().run(saved)
            first.save(directory)
        training.run(step)
        status = in_a_process(lambda number=number, directory=directory: save_and_die(training, directory, number))
        found = checkpoint.latest(directory)
        assert found is not None
        fresh = Training()
        fresh.load(found)
        assert fresh.kfac.steps in (2, step), f"after access {number}"
        if number and status != signal.SIGKILL:
            break
    assert int(directory.with_suffix(".accesses").read_text()) == number - 1 > 10
