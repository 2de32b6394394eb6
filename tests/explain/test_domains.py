"""Domains: what is drawn, how far it is from the input, what is hidden, and predicates of tables in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kaisa.explain import explain
from kaisa.explain.domains import Bins, Domain, Groups, Predicates, Texts, ThinnedTexts
from kaisa.explain.rows import Table
from kaisa.explain.segments import superpixels


@pytest.fixture
def present() -> Tensor:
    """Samples of four features: all, half, one, none but one."""
    return torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()


def table() -> Table:
    training = np.array([[float(number), number % 3] for number in range(9)])  # quartiles 2, 4, 6
    return Table.about(torch.tensor([4.0, 1.0]), training, [1], ("size", "kind"))


def cosine_distances(present: Tensor) -> np.ndarray:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rows = present.numpy().astype(float)
    return metrics.pairwise_distances(rows, np.ones((1, rows.shape[1])), metric="cosine")[:, 0]


def test_superpixels_and_words_are_as_far_as_the_cosine_says(present: Tensor) -> None:
    groups = Groups(torch.zeros(1, 4), torch.arange(4), torch.zeros(1, 4))
    texts = Texts("one two three four")
    np.testing.assert_allclose(groups.distances(present), cosine_distances(present), atol=1e-12)
    np.testing.assert_allclose(texts.distances(present), 100 * cosine_distances(present), atol=1e-12)
    assert (groups.width, texts.width) == (0.25, 25.0)  # of the package lime


def test_rows_of_tables_are_as_far_as_features_have_changed(present: Tensor) -> None:
    bins = Bins(table(), torch.zeros(1, 2))
    np.testing.assert_allclose(bins.distances(present), np.linalg.norm(1.0 - present.numpy(), axis=1))
    assert bins.width == pytest.approx(0.75 * np.sqrt(2))


@pytest.mark.parametrize("kind", [Texts, ThinnedTexts])
def test_what_is_fixed_is_present(kind: type[Texts], generator: torch.Generator) -> None:
    fixed = torch.rand(200, 5, generator=generator) < 0.4
    found, recipe = kind("a b c d e").sample(fixed, generator)
    assert (found | ~fixed).all()
    assert torch.equal(found, recipe)


def test_features_are_present_half_of_the_time(generator: torch.Generator) -> None:
    fixed = torch.zeros(4000, 4).bool()
    for domain in (Texts("a b c d"), Groups(torch.zeros(1, 4), torch.arange(4), torch.zeros(1, 4))):
        found = domain.sample(fixed, generator)[0].double().mean(0)
        torch.testing.assert_close(found, torch.full((4,), 0.5).double(), atol=0.04, rtol=0)  # five deviations


def test_from_one_to_all_but_one_word_is_left_out_and_each_number_as_often(generator: torch.Generator) -> None:
    found = ThinnedTexts("a b c d e").sample(torch.zeros(8000, 5).bool(), generator)[0]
    counts = (~found).sum(1).bincount(minlength=6)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert counts[1:5].double().div(8000).tolist() == pytest.approx([0.25] * 4, abs=0.025)  # five deviations
    assert found.double().mean(0).tolist() == pytest.approx([0.5] * 5, abs=0.03)


def test_the_only_word_of_a_text_is_left_out_half_of_the_time(generator: torch.Generator) -> None:
    found = ThinnedTexts("a").sample(torch.zeros(8000, 1).bool(), generator)[0]
    assert found.double().mean().item() == pytest.approx(0.5, abs=0.03)  # five deviations


def test_rows_are_drawn_feature_by_feature_and_keep_what_is_fixed(generator: torch.Generator) -> None:
    fixed = torch.tensor([[True, True], [True, False], [False, False]]).repeat_interleave(3000, 0)
    found, rows = Bins(table(), torch.zeros(1, 2)).sample(fixed, generator)
    assert (rows[:3000] == torch.tensor([4.0, 1.0])).all()
    assert (rows[3000:6000, 0] == 4.0).all()
    # Of the sizes 0…8, 3 and 4 are in the quartile of 4 (above 2, up to 4); of the kinds, a third is 1.
    assert torch.equal(found[:, 0], (rows[:, 0] > 2) & (rows[:, 0] <= 4))
    assert torch.equal(found[:, 1], rows[:, 1] == 1)
    assert found[6000:, 0].double().mean().item() == pytest.approx(2 / 9, abs=0.04)
    pairs = rows[6000:].unique(dim=0)
    assert len(pairs) == 27  # every size with every kind: features do not come from one row


def test_what_can_be_said_of_a_row_is_in_words() -> None:
    assert table().bins() == ("2 < size ≤ 4", "kind = 1")
    names = Predicates(table(), torch.zeros(1, 2)).names
    assert names == ("size > 2", "size ≤ 4", "size ≤ 6", "kind = 1")
    outside = Table.about(torch.tensor([9.0, 1.0]), table().training, [1], ("size", "kind"))
    assert outside.bins() == ("6 < size", "kind = 1")
    lowest = Table.about(torch.tensor([0.0, 1.0]), table().training, [1], ("size", "kind"))
    assert lowest.bins() == ("size ≤ 2", "kind = 1")


def test_predicates_hold_for_the_rows_that_their_words_say(generator: torch.Generator) -> None:
    domain: Domain = Predicates(table(), torch.zeros(1, 2))
    found, rows = domain.sample(torch.zeros(500, 4).bool(), generator)
    size, kind = rows.unbind(1)
    assert torch.equal(found, torch.stack([size > 2, size <= 4, size <= 6, kind == 1], 1))


def test_a_feature_of_two_predicates_holds_once() -> None:
    domain = Predicates(table(), torch.zeros(1, 2))
    assert domain.spread(torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist() == [1, 0]


def test_absent_entries_become_what_is_asked_for() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [4.0, 0.0]]]])
    columns = torch.tensor([[0, 1], [0, 1]])
    seen: list[Tensor] = []

    def ask(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.sum((1, 2, 3))[:, None]

    def nothing_left(**options: object) -> list[float]:
        seen.clear()
        explain(ask, image, "kernelshap", segments=columns, **options)
        return torch.cat(seen)[1].flatten().tolist()  # after the input itself, the empty set

    assert nothing_left() == [3] * 4 + [1] * 4  # the mean of each channel
    assert nothing_left(hide="own mean") == [2, 4, 2, 4, 2, 0, 2, 0]
    assert nothing_left(hide=7.0) == [7] * 8
    assert nothing_left(hide=-image[0]) == (-image).flatten().tolist()


def test_absent_numbers_of_rows_become_zero_by_default() -> None:
    said = explain(lambda rows: rows.sum(1, keepdim=True), torch.tensor([[2.0, 3.0]]), "kernelshap")
    assert said.values[0].tolist() == pytest.approx([2, 3])


def test_superpixels_have_numbers_without_gaps_and_about_as_many_as_asked_for() -> None:
    image = torch.rand(3, 24, 48)
    grid = superpixels(image, "grid", count=8)
    assert torch.equal(grid, torch.arange(24)[:, None] // 12 * 4 + torch.arange(48) // 12)
    assert superpixels(image, torch.full((24, 48), 7)).unique().tolist() == [0]
    for way in ("slic", "quickshift"):
        numbers = superpixels(image, way)
        assert numbers.unique().tolist() == list(range(int(numbers.max()) + 1))
    for count in (16, 64):
        smooth = torch.linspace(0, 1, 48).expand(3, 24, 48)
        assert count / 2 < int(superpixels(smooth, "slic", count).max()) + 1 < 2 * count


def test_superpixels_do_not_depend_on_the_range_of_the_image() -> None:
    image = torch.zeros(3, 24, 24)
    image[:, 6:18, 3:12] = 1.0
    for way in ("slic", "quickshift"):
        assert torch.equal(superpixels(image, way), superpixels(255 * image - 100, way))


def test_superpixels_stay_on_one_side_of_an_edge() -> None:
    image = torch.zeros(3, 24, 24)
    image[:, :, 12:] = 1.0
    numbers = superpixels(image, "slic")
    assert not set(numbers[:, :12].unique().tolist()) & set(numbers[:, 12:].unique().tolist())


def test_quickshift_has_the_constants_of_the_package_lime() -> None:
    segmentation = pytest.importorskip("skimage.segmentation", reason="needs scikit-image")
    image = torch.rand(3, 64, 64)
    pixels = ((image - image.min()) / (image.max() - image.min())).double().permute(1, 2, 0).numpy()
    expected = segmentation.quickshift(pixels, kernel_size=4, max_dist=200, ratio=0.2, rng=0)
    found = superpixels(image, "quickshift")
    assert int(found.max()) > 1
    assert found.tolist() == expected.tolist()
