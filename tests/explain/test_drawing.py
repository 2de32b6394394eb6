"""Drawings: what is written beside the bars, where tokens stand, what maps are coloured by."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kaisa.explain import Explanation, explain
from kaisa.explain.drawing import WIDTH, figure

NAMES = ["a", "b", "c"]


def said(values: Tensor, kind: str, **more: object) -> Explanation:
    plain = Explanation("saliency", values, kind, None, {}, 0, "", {}, {}, None, ())
    return replace(plain, **more)


def labels(explanation: Explanation, row: int = 0) -> list[str]:
    return [label.get_text() for label in figure(explanation).axes[row].get_yticklabels()]


def widths(explanation: Explanation, row: int = 0) -> list[float]:
    return [float(bar.get_width()) for bar in figure(explanation).axes[row].patches]


def test_features_are_drawn_the_strongest_first_of_each_input() -> None:
    drawn = said(torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, 1.0]]), "features", names=tuple(NAMES))
    assert labels(drawn) == ["b", "c", "a"]
    assert widths(drawn) == [-2.0, 1.0, 0.5]
    assert labels(drawn, 1) == ["a", "c", "b"]


def test_terms_of_a_model_with_combinations_are_drawn_in_words() -> None:
    ask = lambda rows: (rows[:, 0] + 5 * rows[:, 1] * rows[:, 2])[:, None]  # noqa: E731
    drawn = explain(ask, torch.ones(1, 3), "cle", names=NAMES, alpha=1e-9, samples=100)
    assert labels(drawn)[:2] == ["b and c", "a"]
    assert widths(drawn)[:2] == pytest.approx([5, 1], abs=1e-4)


def test_quartiles_of_rows_are_drawn_in_words() -> None:
    training = torch.arange(9.0)[:, None].expand(9, 3) + torch.tensor([0.0, 10.0, 20.0])
    drawn = explain(lambda rows: rows[:, :1], torch.tensor([[4.0, 14.0, 24.0]]), "lime", training=training, names=NAMES)
    assert set(labels(drawn)) == {"2 < a ≤ 4", "12 < b ≤ 14", "22 < c ≤ 24"}


def test_a_rule_is_drawn_with_its_precision_as_it_grows() -> None:
    details = {"inputs": [{"rule": ["a > 1", "c = 2"], "prefixes": [{"precision": 0.6}, {"precision": 0.97}]}]}
    drawn = said(torch.tensor([[1.0, 0.0, 1.0]]), "features", names=tuple(NAMES), details=details)
    assert labels(drawn) == ["a > 1", "and c = 2"]
    assert widths(drawn) == [0.6, 0.97]


def test_a_rule_that_says_nothing_is_drawn_too() -> None:
    drawn = explain(lambda rows: torch.tensor([[0.0, 1.0]]).expand(len(rows), 2), torch.ones(1, 3), "anchors")
    assert labels(drawn) == ["whatever it is"]
    assert widths(drawn) == [1.0]


def test_tokens_run_on_in_lines_without_overlap() -> None:
    tokens = tuple(f"word{number}" * (1 + number % 3) for number in range(30))
    axis = figure(said(torch.randn(1, 30), "tokens", names=(tokens,))).axes[0]
    assert [text.get_text() for text in axis.texts] == list(tokens)
    places = [(text.get_position()[1], text.get_position()[0], len(text.get_text())) for text in axis.texts]
    assert places == sorted(places)
    assert len({line for line, _, _ in places}) > 1
    for (line, start, length), (next_line, following, _) in itertools.pairwise(places):
        assert start + length <= WIDTH
        assert next_line > line or following > start + length


def test_tokens_are_coloured_by_the_share_of_the_largest() -> None:
    axis = figure(said(torch.tensor([[4.0, -4.0, 0.0]]), "tokens", names=(("up", "down", "$idle$"),))).axes[0]
    red, blue, white = (text.get_bbox_patch().get_facecolor() for text in axis.texts)
    assert red[0] > 0.6 > red[2]
    assert blue[2] > 0.6 > blue[0]
    assert min(white[:3]) > 0.9
    assert [text.get_color() for text in axis.texts] == ["white", "white", "black"]
    assert axis.texts[2].get_text() == r"\$idle\$"


def test_signed_maps_are_coloured_around_zero_and_others_from_zero() -> None:
    values = torch.tensor([[[1.0, -4.0], [0.0, 2.0]]])
    image = torch.rand(1, 3, 2, 2)
    signed = figure(said(values, "map", inputs=image)).axes[1].images[0]
    assert signed.get_clim() == (-4, 4)
    unsigned = figure(said(values.abs(), "map", inputs=image)).axes[1].images[0]
    assert unsigned.get_clim() == (0, 4)
    assert signed.get_cmap().name != unsigned.get_cmap().name


def test_the_title_names_the_target_and_the_figures() -> None:
    drawn = said(torch.ones(1, 3), "features", target=(2,), quality={"local_r2": (0.51234,)})
    assert figure(drawn).get_suptitle() == "saliency, target 2\nlocal_r2 0.512"
    assert "target frog" in figure(replace(drawn, details={"target_names": ["frog"]})).get_suptitle()
