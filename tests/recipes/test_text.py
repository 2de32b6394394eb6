from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from kaisa.errors import DataError
from kaisa.recipes.sequences import Sequences, TestSequences, hidden_count, hide
from kaisa.recipes.tasks import IGNORED
from kaisa.recipes.text import Vocabulary, read_text, read_text_file

VERSE = "the cat saw the eel\nthe eel saw the <unk>\n"
LONG = Vocabulary("characters", tuple(chr(65 + number) for number in range(60)))


def test_the_most_frequent_tokens_are_known_and_the_others_are_one() -> None:
    words = Vocabulary.fit(VERSE, "words", 6)
    assert words.tokens == ("<unk>", "<mask>", "the", "\n", "eel", "saw")
    assert words.encode("the dog saw\n<unk>").tolist() == [2, 0, 5, 3, 0]
    characters = Vocabulary.fit("abcab", "characters", 100)
    assert characters.tokens == ("<unk>", "<mask>", "a", "b", "c")
    assert characters.encode("cabz").tolist() == [4, 2, 3, 0]
    assert (words.unknown, words.hidden) == (0, 1)


def test_a_file_by_itself_has_the_tokens_that_it_has_in_training(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"the cat\r\nsaw\r\n")
    (tmp_path / "valid.txt").write_bytes(b"\r\na\r\n")
    text = read_text(tmp_path, "characters", 100)
    assert torch.equal(text.vocabulary.encode(read_text_file(tmp_path / "valid.txt")), text.test)
    assert len(text.test) == 5
    with pytest.raises(DataError, match=r"no such text file: .*nowhere\.txt"):
        read_text_file(tmp_path / "nowhere.txt")


def test_training_and_test_text_are_told_apart_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abab")
    (tmp_path / "valid.txt").write_text("ba?")
    (tmp_path / "notes.md").write_text("no text of this kind")
    text = read_text(tmp_path, "characters", 100)
    assert (text.train.tolist(), text.test.tolist()) == ([2, 3, 2, 3], [3, 2, 0])
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        for name in ("train.txt", "valid.txt"):
            archive.write(tmp_path / name, f"inside/{name}")
    zipped = read_text(tmp_path / "text.zip", "characters", 100)
    assert torch.equal(zipped.train, text.train)
    assert torch.equal(zipped.test, text.test)


def test_of_a_single_file_the_last_tenth_is_tested_on(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("a" * 90 + "b" * 10)
    text = read_text(tmp_path / "novel.txt", "characters", 100)
    assert text.train.tolist() == [2] * 90
    assert text.test.tolist() == [0] * 10


def test_other_text_is_tested_on_and_only_the_parts_so_named_count(tmp_path: Path) -> None:
    for folder, files in {
        "a": {"train.txt": "ab", "valid.txt": "a"},
        "b": {"train.txt": "b", "test.txt": "ba"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
    (tmp_path / "c.txt").write_text("aab")
    text = read_text(tmp_path / "a", "characters", 100, tmp_path / "b")
    assert (text.train.tolist(), text.test.tolist()) == ([2, 3], [3, 2])
    assert read_text(tmp_path / "a", "characters", 100, tmp_path / "c.txt").test.tolist() == [2, 2, 3]
    assert read_text(tmp_path / "c.txt", "characters", 100, tmp_path / "b").train.tolist() == [2, 2, 3]
    with pytest.raises(DataError, match=r"no such folder or zip file: .*nowhere"):
        read_text(tmp_path / "a", "characters", 100, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"no text in .*; give .txt files"), (b"\xff\xfe\x00", r"a\.txt is not text in UTF-8")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(folder, "words", 100)


def sequences(**changes) -> Sequences:
    fields = {"positions": 8, "size": 4, "is_masked": False, "seed": 3}
    return Sequences(torch.arange(2000), LONG, **{**fields, **changes})


def test_the_target_of_each_token_is_the_next() -> None:
    inputs, targets = (torch.cat(part) for part in zip(*sequences().epoch(0), strict=True))
    assert torch.equal(targets, inputs + 1)
    assert len(inputs) == 4 * len(sequences())
    assert len(set(inputs.flatten().tolist())) == inputs.numel()


def test_an_epoch_of_sequences_is_a_function_of_seed_and_number_and_ranks_share_it() -> None:
    def epoch(number: int, **changes) -> torch.Tensor:
        return torch.stack([torch.stack(batch) for batch in sequences(**changes).epoch(number)])

    for is_masked in (False, True):
        whole = epoch(2, is_masked=is_masked)
        assert torch.equal(epoch(2, is_masked=is_masked), whole)
        assert not torch.equal(epoch(1, is_masked=is_masked), whole)
        halves = [epoch(2, is_masked=is_masked, rank=rank, ranks=2) for rank in range(2)]
        assert torch.equal(torch.cat(halves, 2), whole)


def test_cuts_move_from_epoch_to_epoch() -> None:
    starts = {int(inputs[0, 0]) % 8 for epoch in range(40) for inputs, _ in sequences().epoch(epoch)}
    assert starts == set(range(8))


def test_hidden_are_fifteen_per_cent_of_each_sequence_and_most_of_them_are_covered() -> None:
    tokens = torch.randint(2, 60, (400, 100))
    shown, targets = hide(tokens, LONG, torch.Generator().manual_seed(1))
    chosen = targets != IGNORED
    assert set(chosen.sum(1).tolist()) == {15} == {hidden_count(100)}
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(shown[~chosen], tokens[~chosen])
    covered = (shown[chosen] == LONG.hidden).double().mean().item()
    kept = (shown[chosen] == tokens[chosen]).double().mean().item()
    assert covered == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 58, abs=0.02)
    assert chosen.double().mean(0).min() > 0.08
    assert set(shown[chosen].tolist()) == set(range(1, 60))


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_terms_of_a_batch_are_its_predicted_tokens(is_masked: bool) -> None:
    batches = sequences(is_masked=is_masked, positions=40, ranks=2)
    for _, targets in batches.epoch(0):
        assert int((targets != IGNORED).sum()) == batches.terms


@pytest.mark.parametrize("is_masked", [False, True])
def test_tests_see_each_token_once_and_the_same_each_time(is_masked: bool) -> None:
    tests = TestSequences(torch.arange(2, 57), LONG, 9, 4, is_masked)
    first, again = list(tests), list(tests)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert [len(inputs) for inputs, _ in first] == [4, 2]
    if not is_masked:
        assert torch.cat([targets for _, targets in first]).flatten().tolist() == list(range(3, 57))


def test_the_words_of_wikitext_are_read(real_data: Path) -> None:
    text = read_text(real_data / "wikitext-2-validtest.zip", "words", 4096)
    assert (len(text.train), len(text.test)) == (245_569, 217_646)
    assert len(text.vocabulary) == 4096
