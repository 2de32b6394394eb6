from __future__ import annotations

import pytest
import torch
from torch import nn

from kaisa.recipes.language_models import Width
from kaisa.recipes.masked_language import MaskedBert, TransformersBert, masked_bert

TINY = Width(2, 8, 2, 32, 11, 6)


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_token_gets_scores_that_depend_on_both_sides() -> None:
    model = MaskedBert(TINY)
    tokens = torch.randint(0, 11, (3, 6))
    scores = model(tokens)
    assert scores.shape == (3, 6, 11)
    for place in (0, 5):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        assert (model(other) - scores).abs().amax(-1).min() > 0


def test_bert_of_transformers_has_our_parameters_and_the_two_segments() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = TransformersBert(TINY)
    assert numbers(model) == numbers(MaskedBert(TINY)) + 2 * TINY.features
    assert model(torch.randint(0, 11, (3, 6))).shape == (3, 6, 11)
    assert isinstance(masked_bert(TINY), TransformersBert)


def test_without_transformers_our_own_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(masked_bert(TINY), MaskedBert)
