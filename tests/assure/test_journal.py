"""Records and the journal: what is refused, and that no kill, damage or bad stream loses or changes a demand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaisa.assure.journal import Journal, append, open_journal
from kaisa.assure.network import DECLINED
from kaisa.assure.records import Record, check_order, read_records
from kaisa.errors import DataError, KaisaError, StateError

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
MODEL = "a" * 64


def demands(count: int, failing: Sequence[int] = ()) -> list[Record]:
    return [
        Record(START + timedelta(minutes=index), index in failing, "Katze", "Hund" if index in failing else "Katze")
        for index in range(count)
    ]


def made(path: Path, count: int) -> Journal:
    return append(open_journal(path, "eye", MODEL), demands(count, [1]), NOW)


def test_a_journal_reads_as_it_was_written(tmp_path: Path) -> None:
    written = made(tmp_path / "j", 5)
    found = open_journal(tmp_path / "j", "eye", MODEL)
    assert found == written
    assert (found.demands, found.failures) == (5, 1)
    assert found.records == tuple(demands(5, [1]))


def test_demands_are_added_behind_those_that_are_there_and_once(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for count in (2, 2, 5):
        journal = append(open_journal(path, "eye", MODEL), demands(count, [1]), NOW)
        assert journal.demands == count
    whole = path.read_bytes()
    only_new = append(open_journal(path, "eye", MODEL), demands(8, [1])[5:], NOW)
    overlapping = append(open_journal(path, "eye", MODEL), demands(9, [1])[6:], NOW)
    assert (only_new.demands, overlapping.demands) == (8, 9)
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes() == (made(tmp_path / "other", 9), (tmp_path / "other").read_bytes())[1]


def test_a_kill_at_any_byte_loses_nothing_that_the_stream_does_not_bring_again(tmp_path: Path) -> None:
    path, stream = tmp_path / "j", demands(4, [1])
    made(path, 4)
    whole = path.read_bytes()
    ends = [position for position, byte in enumerate(whole, 1) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = open_journal(path, "eye", MODEL)
        assert journal.demands == max(0, sum(end <= cut for end in ends) - 1)
        append(journal, stream, NOW)
        assert path.read_bytes() == whole


@settings(deadline=None, max_examples=200)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_no_changed_byte_goes_unseen(position: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    path.unlink(missing_ok=True)
    made(path, 4)
    whole = path.read_bytes()
    position %= len(whole)
    damaged = whole[:position] + bytes([value]) + whole[position + 1 :]
    path.write_bytes(damaged)
    if damaged == whole:
        assert open_journal(path, "eye", MODEL).demands == 4
    elif position == len(whole) - 1:  # the last line lacks its end: as after a kill
        assert append(open_journal(path, "eye", MODEL), demands(4, [1]), NOW).demands == 4
        assert path.read_bytes() == whole
    else:
        with pytest.raises(
            StateError, match=r"damaged in line|is no kaisa|another network|is the journal of|the prior or"
        ):
            open_journal(path, "eye", MODEL)
        assert path.read_bytes() == damaged


def test_lines_that_were_taken_out_or_exchanged_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "j"
    made(path, 5)
    lines = path.read_bytes().split(b"\n")
    for order in ([0, 1, 3, 4, 5], [0, 2, 1, 3, 4, 5], [0, 1, 1, 2, 3], [1, 2, 3]):
        path.write_bytes(b"".join(lines[index] + b"\n" for index in order))
        with pytest.raises(StateError, match=r"damaged in line|is no kaisa"):
            open_journal(path, "eye", MODEL)


def test_a_line_of_another_journal_is_not_taken(tmp_path: Path) -> None:
    """Each line is tied to all before it, the header among them: a good demand of another network is none of this."""
    made(tmp_path / "j", 3)
    append(open_journal(tmp_path / "other", "eye", "b" * 64), demands(3), NOW)
    own, others = ((tmp_path / name).read_bytes().split(b"\n") for name in ("j", "other"))
    (tmp_path / "j").write_bytes(b"\n".join([*own[:2], others[2], *own[3:]]))
    with pytest.raises(StateError, match="damaged in line 3"):
        open_journal(tmp_path / "j", "eye", MODEL)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for content in (b"my diary", b"my diary\n", b'{"format":1}\n', b"\x00\xff", b"[]\n", b'{"format":2,"kind":"x"}'):
        path.write_bytes(content)
        with pytest.raises(StateError, match="is no kaisa assure journal"):
            open_journal(path, "eye", MODEL)
        assert path.read_bytes() == content


def test_another_model_or_system_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "j", 2)
    with pytest.raises(StateError, match=r"model file has changed since .* another network"):
        open_journal(tmp_path / "j", "eye", "b" * 64)
    with pytest.raises(StateError, match="journal of 'eye', not of 'ear'"):
        open_journal(tmp_path / "j", "ear", MODEL)
    with pytest.raises(StateError, match="fixed before the first demand is seen"):
        open_journal(tmp_path / "j", "eye", MODEL, basis="c" * 64)


def test_two_processes_do_not_count_the_same_demand(tmp_path: Path) -> None:
    first, second = (open_journal(tmp_path / "j", "eye", MODEL) for _ in range(2))
    append(first, demands(2), NOW)
    with pytest.raises(StateError, match="another process has written"):
        append(second, demands(2), NOW)
    assert open_journal(tmp_path / "j", "eye", MODEL).demands == 2


EARLY, LATE = START - timedelta(seconds=1), NOW + timedelta(seconds=1)
THREE = demands(3)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([*THREE, THREE[2]], "record 4 is the same as record 3"),
        ([*THREE, replace(THREE[0], time=START)], "record 4 is of .* before the one that precedes it"),
        ([THREE[0], THREE[2], THREE[1]], "not demand 2 of the journal"),
        ([*THREE, replace(THREE[0], time=LATE)], "record 4 is of .* in the future"),
        ([replace(THREE[0], time=EARLY), *THREE], "before the one that precedes it"),
        ([THREE[0], replace(THREE[1], failed=True), THREE[2]], "not demand 2 of the journal"),
    ],
)
def test_a_bad_stream_is_refused_and_the_journal_left_as_it_was(
    stream: list[Record], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "j"
    journal = append(open_journal(path, "eye", MODEL), THREE[:2], NOW)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=message):
        append(journal, stream, NOW)
    assert path.read_bytes() == whole


def test_demands_from_before_the_system_was_frozen_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="before the system was frozen"):
        append(open_journal(tmp_path / "j", "eye"), THREE, NOW, since=START + timedelta(seconds=1))
    from_then_on = append(open_journal(tmp_path / "j", "eye"), THREE, NOW, since=THREE[0].time)
    assert from_then_on.demands == 3


def test_a_demand_of_this_very_moment_is_not_in_the_future(tmp_path: Path) -> None:
    assert append(open_journal(tmp_path / "j", "eye"), THREE, THREE[-1].time).demands == 3


def test_an_id_tells_demands_apart_and_names_those_that_are_the_same() -> None:
    check_order([replace(THREE[0], identity=name) for name in "ab"], NOW)
    with pytest.raises(DataError, match="record 2 is the same as record 1"):
        check_order([replace(THREE[0], identity="a"), replace(THREE[1], identity="a")], NOW)


# Files of records


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("truth,prediction,time,camera\n3,3.0,2026-01-01T00:00:00Z,left\n3,5,2026-01-01,x\n")
    (tmp_path / "r.jsonl").write_text(
        '{"time": "2026-01-01T01:00:00+01:00", "prediction": 3, "truth": 3.0}\n'
        '{"time": "2026-01-01", "prediction": "5", "truth": 3}\n'
    )
    records = read_records(tmp_path / "r.csv")
    assert records == read_records(tmp_path / "r.jsonl")
    assert [record.failed for record in records] == [False, True]


def test_what_has_an_input_and_no_prediction_is_put_to_the_network(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(
        "prediction,truth,time,input\n,3,2026-01-01,a/one.png\n7,7,2026-01-02,\n,3,2026-01-03,two.png\n,3,2026-01-04,3.png\n"
    )
    asked: list[Path] = []

    def answer(paths: Sequence[Path]) -> list[tuple[str, str]]:
        asked.extend(paths)
        return [("a" * 64, "3"), ("b" * 64, "5"), ("c" * 64, DECLINED)]

    records = read_records(tmp_path / "r.csv", answer)
    assert asked == [tmp_path / "a" / "one.png", tmp_path / "two.png", tmp_path / "3.png"]
    assert [record.failed for record in records] == [False, False, True, False]
    assert [record.prediction for record in records] == ["3", "7", "5", DECLINED]
    assert records[2].input == "b" * 64
    with pytest.raises(DataError, match="3 records with an input and no prediction"):
        read_records(tmp_path / "r.csv")


def test_a_record_may_say_itself_whether_it_failed(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("failure,time,id\ntrue,2026-01-01,a\n0,2026-01-01,b\n")
    assert [record.failed for record in read_records(tmp_path / "r.csv")] == [True, False]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "prediction,truth,time\n1,2\n", "line 2: there are 2 cells under 3"),
        ("r.csv", "prediction,truth\n1,2\n", "line 2: the time is missing"),
        ("r.csv", "prediction,truth,time\n1,nan,2026-01-01\n", "line 2: the truth is 'nan'"),
        ("r.csv", "prediction,truth,time\n,1,2026-01-01\n", "line 2: the prediction is ''"),
        ("r.csv", "prediction,truth,time\n1,1,yesterday\n", "line 2: the time is 'yesterday'"),
        ("r.csv", 'prediction,truth,time\n"1,1,2026-01-01\n', "no CSV"),
        ("r.csv", "time,time\n1,1\n", "line 1: a column is there twice"),
        ("r.csv", "failure,time\nmaybe,2026-01-01\n", "failure is 'maybe'"),
        ("r.csv", "failure,time,input\n0,2026-01-01,abc\n", "the input is 'abc'"),
        ("r.csv", "truth,time,input\n,2026-01-01,a.png\n", "line 2: the truth is ''"),
        ("r.csv", "prediction,truth,time,input\n1,1,2026-01-01,a.png\n", "the input is 'a.png'"),
        ("r.csv", "failure,time\n0,2026-01-01", "last line .* does not end"),
        ("r.jsonl", "{}\n", "line 1: the time is missing"),
        ("r.jsonl", "[]\n", "line 1: it is no JSON object"),
        ("r.jsonl", '{"prediction": NaN, "truth": 1, "time": "2026-01-01"}\n', "line 1: the prediction is nan"),
        ("r.jsonl", '{"prediction": 1, "truth": null, "time": "2026-01-01"}\n', "the truth is missing"),
        ("r.jsonl", '{"prediction": [1], "truth": 1, "time": "2026-01-01"}\n', r"the prediction is \[1\]"),
        ("r.jsonl", '{"truth": 1, "truth": 2, "time": "2026-01-01"}\n', "a field is there twice"),
        ("r.jsonl", '{"prediction": 1,\n', "line 1: it is no JSON"),
        ("r.txt", "1\n", "ending '.txt'"),
        ("r.csv", "prediction,truth,time\n\xff", "last line"),
    ],
)
def test_a_malformed_record_is_named_by_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_files_that_are_missing_or_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="not in UTF-8"):
        read_records(tmp_path / "r.csv")
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "none.csv")


texts = st.text(max_size=80) | st.sampled_from(["prediction,truth,time\n1,1,2026-01-01\n", "failure,time\n"])


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(["r.csv", "r.jsonl"]), one=texts, other=texts)
def test_whatever_a_file_holds_is_read_or_refused_in_words(
    name: str, one: str, other: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_text(one + other + "\n", encoding="utf-8", errors="ignore", newline="")
    with suppress(KaisaError):
        assert all(isinstance(record, Record) for record in read_records(path))


def test_what_a_journal_keeps_of_a_record_is_all_of_it() -> None:
    record = Record(START, True, "a", "b", "id", "c" * 64)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
