"""What happens to real processes under torchrun when one of them is killed, differs, stops or is slow."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.support.torchrun import World, torchrun

TIMEOUT = 4  # seconds that a rank waits for another
PATIENCE = 15 * TIMEOUT  # far from the half-hour that a rank would wait of itself
LONGEST = 300  # seconds after which any of these runs hangs
PLAN = {"timeout": TIMEOUT, "options": {"grad_worker_fraction": "mem"}}


def finish(folder: Path, plan: dict[str, object], ranks: int = 2, restarts: int = 0) -> tuple[int, World]:
    options = ["--standalone", "--max-restarts", str(restarts)]
    with torchrun(folder, {**PLAN, **plan}, ranks, options) as world:
        return world.wait(LONGEST), world


def results(folder: Path, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / f"result_{rank}.pt", weights_only=True)


def assert_equal_to_the_bit(found: Path, expected: Path, rank: int) -> None:
    for kind, tensors in results(expected, rank).items():
        assert tensors.keys() == results(found, rank)[kind].keys()
        for name, tensor in tensors.items():
            assert torch.equal(results(found, rank)[kind][name], tensor), f"rank {rank}: {kind} {name}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to which nothing has happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, world = finish(folder, {})
    assert status == 0, world.log
    return folder


def seconds(world: World, rank: int) -> float:
    return float(world.error(rank).split(" ", 1)[0])


@pytest.mark.parametrize(
    ("fault", "step", "resumed"),
    [("kill_in_forward", 3, 2), ("kill_in_reduction", 4, 4), ("kill_after_shard", 3, 2)],
)
def test_a_killed_rank_is_named_and_the_restarted_run_equals_an_undisturbed_one(
    tmp_path: Path, undisturbed: Path, fault: str, step: int, resumed: int
) -> None:
    status, world = finish(tmp_path, {"fault": fault, "step": step}, restarts=1)
    assert status == 0, world.log
    assert "CollectiveError" in world.error(0)
    assert "rank 1 is dead or unreachable" in world.error(0)
    assert seconds(world, 0) < PATIENCE
    assert (tmp_path / f"resumed_at_{resumed}").exists()
    for rank in (0, 1):
        assert_equal_to_the_bit(tmp_path, undisturbed, rank)


def test_of_three_ranks_the_two_that_live_name_the_first_when_it_is_killed(tmp_path: Path) -> None:
    status, world = finish(tmp_path, {"fault": "kill_in_reduction", "step": 1, "rank": 0}, ranks=3)
    assert status != 0
    for rank in (1, 2):
        assert "rank 0 is dead or unreachable" in world.error(rank)
        assert not re.search(r"rank [12] is dead", world.error(rank))


def test_torchrun_names_the_killed_rank_too(tmp_path: Path) -> None:
    status, world = finish(tmp_path, {"fault": "kill_in_forward", "step": 0, "bears_the_agent": False})
    assert status != 0
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", world.log)


def test_ranks_built_differently_are_told_what_differs_at_construction(tmp_path: Path) -> None:
    faults = {
        "other_width": "layers, parameters",
        "other_depth": "layers, parameters",
        "other_parameters": "parameters",
        "other_options": "factor_update_steps",
        "other_fraction": "placement, deferred",
        "other_seed": "seed",
    }
    # Of four ranks, because two fractions of two ranks make the same groups.
    status, world = finish(tmp_path, {"constructions": list(faults)}, ranks=4)
    assert status == 0, world.log
    for fault, facts in faults.items():
        expected = ", ".join(f"{fact} (ranks [1] differ from rank 0)" for fact in facts.split(", "))
        for rank in range(4):
            found = (tmp_path / f"{fault}_{rank}").read_text()
            assert found == f"ConfigurationError: the ranks were built differently: {expected}"


def test_a_rank_whose_options_cannot_work_is_an_error_on_the_others(tmp_path: Path) -> None:
    status, world = finish(tmp_path, {"fault": "bad_options", "ddp": False})
    assert status != 0
    assert "damping is -1.0" in world.error(1)
    assert "CollectiveError" in world.error(0)
    assert "rank 1 has ended" in world.error(0)


def test_a_slow_rank_with_a_loss_that_is_not_a_number_stops_nobody(tmp_path: Path, undisturbed: Path) -> None:
    status, world = finish(tmp_path, {"fault": "nan", "step": 2, "slow": 0.1})
    assert status == 0, world.log
    found = results(tmp_path, 0)
    assert all(bool(torch.isfinite(tensor).all()) for kind in found.values() for tensor in kind.values())
    assert found["parameters"].keys() == results(undisturbed, 0)["parameters"].keys()
    for name, parameter in results(tmp_path, 1)["parameters"].items():
        assert torch.equal(parameter, found["parameters"][name])


def test_a_slow_rank_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    status, world = finish(tmp_path, {"slow": 0.1, "saves": False})
    assert status == 0, world.log
    assert_equal_to_the_bit(tmp_path, undisturbed, 0)


def test_a_rank_whose_data_end_early_is_named(tmp_path: Path) -> None:
    status, world = finish(tmp_path, {"fault": "exhausted", "step": 3})
    assert status != 0
    assert "rank 1 has ended, last seen at exchange" in world.error(0)


def test_a_rank_that_skips_a_step_is_an_error_that_says_where_both_are(tmp_path: Path) -> None:
    status, world = finish(tmp_path, {"fault": "skips_step", "step": 2, "saves": False, "timeout": 2})
    assert status != 0
    # Whichever rank gives up first, the other says where it was.
    place = r"exchange \d+ \(\w+\)"
    last = rf"rank 1 (lives and is at {place}|has ended, last seen at {place}, where it lost another rank)"
    assert re.search(rf"{last}.*; rank 0 is at {place}", world.error(0))
    assert seconds(world, 0) < PATIENCE


def test_an_interrupt_ends_everybody(tmp_path: Path) -> None:
    with torchrun(tmp_path, {**PLAN, "fault": "interrupted", "until": 1000}) as world:
        world.wait_for("started_0")
        world.wait_for("started_1")
        os.kill(world.agent.pid, signal.SIGINT)
        assert world.wait(LONGEST) != 0
        assert world.survivors() == []
