"""BERT for masked-language modelling alone: Transformers' where it is installed, and otherwise our own.

Both have the parameters of BERT without its pooler and the head for the order of sentences; dropout is left out of
both, for the texts that train here in minutes are passed over a few times only. Their names of parameters differ: the
record of a run says which was trained, and neither takes the weights of the other.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.recipes.extras import load_extra
from kaisa.recipes.language_models import BertBlock, Width

SPREAD = 0.02  # standard deviation of the first weights, as in the published models


class MaskedBert(nn.Module):
    """BERT that says which token stands at each place."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.tokens = nn.Embedding(width.tokens, width.features)
        self.positions = nn.Embedding(width.positions, width.features)
        self.norm = nn.LayerNorm(width.features)
        self.blocks = nn.ModuleList(BertBlock(width) for _ in range(width.blocks))
        self.transform = nn.Linear(width.features, width.features)
        self.transform_norm = nn.LayerNorm(width.features)
        self.prediction = nn.Linear(width.features, width.tokens)
        self.prediction.weight = self.tokens.weight
        initialize_language_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores (batch, positions, tokens)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.norm(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.prediction(self.transform_norm(functional.gelu(self.transform(x))))
        return scores


class TransformersBert(nn.Module):
    """Transformers' BertForMaskedLM, of which the scores are all that is returned."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        transformers: Any = load_extra("transformers", "its BERT", "transformers")
        config = transformers.BertConfig(
            vocab_size=width.tokens,
            hidden_size=width.features,
            num_hidden_layers=width.blocks,
            num_attention_heads=width.heads,
            intermediate_size=width.hidden,
            max_position_embeddings=width.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = transformers.BertForMaskedLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores (batch, positions, tokens)."""
        scores: Tensor = self.bert(input_ids=tokens).logits
        return scores


def masked_bert(width: Width) -> nn.Module:
    """Build Transformers' BERT if it is installed, and otherwise our own."""
    if importlib.util.find_spec("transformers") is not None:
        return TransformersBert(width)
    return MaskedBert(width)


def initialize_language_(model: nn.Module) -> nn.Module:
    """Set weights of linear layers and embeddings as the published transformers begin, and no bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=SPREAD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
