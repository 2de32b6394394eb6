"""Hardware profiles: what is shipped, kept and refused, and what lies between and beyond the numbers measured."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from kaisa.errors import ConfigurationError
from kaisa.kfac.hardware import Hardware, Link, interpolated, shipped_profiles

TABLE = ((1.0, 10.0), (10.0, 1000.0))


def test_profiles_of_five_machines_are_shipped() -> None:
    assert shipped_profiles() == ("a100", "cpu", "h100", "h200", "v100-edr")


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_profile_says_of_every_number_where_it_comes_from(name: str) -> None:
    profile = Hardware.load(name)
    assert profile.name == name
    without = {"name", "sources", "contention"}
    assert set(profile.sources) - without == {entry.name for entry in fields(Hardware)} - without
    assert all(len(source) > 10 for source in profile.sources.values())


@pytest.mark.parametrize("name", shipped_profiles())
def test_larger_matrices_take_longer_and_are_multiplied_faster(name: str) -> None:
    profile = Hardware.load(name)
    sides = [2**power for power in range(1, 15)]
    for table in ("eigen", "cholesky", "warm_eigen"):
        seconds = [profile.decomposition_seconds(table, side) for side in sides]
        assert seconds == sorted(seconds)
    rates = [profile.rate(side) for side in sides]
    # A measured rate has noise.
    assert all(later > 0.85 * rate for rate, later in pairwise(rates))
    assert rates[-1] > 10 * rates[0]


def test_a_profile_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    profile = replace(Hardware.load("A100"), name="own", contention=((1.0, 1.0), (4.0, 2.0)))
    path = tmp_path / "own.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    assert Hardware.load(path) == profile
    assert Hardware.load(profile) is profile


def test_an_unknown_profile_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigurationError, match=r"no hardware profile 'abacus'; give one of a100, cpu, h100, h200, v100-edr"
    ):
        Hardware.load("abacus")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is JSON; this is not"),
        ("[]", "a JSON object; found list"),
        ('{"name": "x"}', "missing: ranks_per_node"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Hardware.from_json(text)


def test_an_entry_that_nobody_knows_is_refused() -> None:
    entries = {**json.loads(Hardware.load("a100").to_json()), "colour": "green"}
    with pytest.raises(ConfigurationError, match="not known: colour"):
        Hardware.from_json(json.dumps(entries))


@pytest.mark.parametrize(("at", "value"), [(1.0, 10.0), (10.0, 1000.0), (10.0**0.5, 100.0), (0.5, 5.0), (20.0, 8000.0)])
def test_tables_are_read_on_a_straight_line_of_logarithms_and_go_on_with_given_powers(at: float, value: float) -> None:
    assert interpolated(TABLE, at, below=1.0, beyond=3.0) == pytest.approx(value, rel=1e-12)


def test_equal_blocks_take_as_long_as_a_batch_but_never_less_than_one_alone() -> None:
    profile = replace(
        Hardware.load("a100"),
        decompositions={"eigen": ((8.0, 1e-3),)},
        batched_decompositions={"eigen": ((8.0, 1e-5),)},
    )
    assert profile.decomposition_seconds("eigen", 8) == pytest.approx(1e-3)
    assert profile.decomposition_seconds("eigen", 8, 10) == pytest.approx(1e-3)
    assert profile.decomposition_seconds("eigen", 8, 1000) == pytest.approx(1e-2)
    assert replace(profile, batched_decompositions={}).decomposition_seconds("eigen", 8, 10) == pytest.approx(1e-2)


def test_a_solver_without_times_is_refused() -> None:
    profile = replace(Hardware.load("a100"), decompositions={"eigen": ((8.0, 1e-3),)})
    with pytest.raises(ConfigurationError, match="knows no times of 'cholesky'; it knows eigen"):
        profile.decomposition_seconds("cholesky", 8)


def test_a_link_is_held_up_by_the_busiest_rank_or_by_the_busiest_node() -> None:
    link = Link(latency=1.0, per_peer=0.5, bandwidth=10.0, shared=20.0)
    assert link.seconds(100.0, 100.0, peers=3) == pytest.approx(1 + 1.5 + 10)
    assert link.seconds(100.0, 400.0, peers=3) == pytest.approx(1 + 1.5 + 20)
    assert link.seconds(100.0, 400.0, peers=3, calls=2) == pytest.approx(2 * (1 + 1.5) + 20)
    assert replace(link, shared=None).seconds(100.0, 400.0, peers=3) == pytest.approx(1 + 1.5 + 10)


def test_work_takes_longer_where_ranks_are_crowded() -> None:
    profile = replace(Hardware.load("a100"), contention=((1.0, 1.0), (2.0, 1.5), (4.0, 3.0)))
    assert [profile.crowding(ranks) for ranks in (1, 2, 4, 8)] == pytest.approx([1.0, 1.5, 3.0, 6.0])
    assert Hardware.load("a100").crowding(8) == 1.0
