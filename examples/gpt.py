"""K-FAC for a decoder-only transformer with a tied embedding, on the characters of a text, in a plain loop.

python examples/gpt.py TEXT.txt --steps 500
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import kaisa


class Block(nn.Module):
    """Attention to what came before, and a perceptron."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(features), nn.LayerNorm(features)
        self.inputs, self.output = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.hidden = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of every place (batch, positions, features)."""
        parts = self.inputs(self.first(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.hidden(self.second(x))


class Decoder(nn.Module):
    """Says which token comes next at every place."""

    def __init__(self, tokens: int, positions: int, features: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, features), nn.Embedding(positions, features)
        self.blocks = nn.Sequential(*(Block(features, features // 32) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, tokens, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the scores (batch, positions, tokens)."""
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


@torch.no_grad()
def bits_per_token(model: nn.Module, tokens: Tensor, positions: int, at_once: int = 64) -> float:
    """Returns the mean over all tokens that are foretold, however many sequences are looked at at once."""
    windows = tokens[: len(tokens) // (positions + 1) * (positions + 1)].reshape(-1, positions + 1)
    losses = [
        nn.functional.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum")
        for w in windows.split(at_once)
    ]
    return torch.stack(losses).sum().item() / windows[:, 1:].numel() / math.log(2)


def train(file: Path, steps: int, features: int = 128, blocks: int = 4, positions: int = 128, batch: int = 32) -> float:
    """Trains on nine tenths of a text; returns the bits per character on the last tenth."""
    torch.manual_seed(0)
    text = file.read_text(encoding="utf-8")
    numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([numbers[letter] for letter in text])
    trained, tested = tokens.tensor_split([len(tokens) * 9 // 10])
    model = Decoder(len(numbers), positions, features, blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, steps, pct_start=0.05)
    # The loss is a mean over tokens, not over sequences.
    kfac = kaisa.KFACPreconditioner(model, optimizer, inv_update_steps=50, loss_terms=batch * positions)
    for step in range(steps):
        starts = torch.randint(len(trained) - positions, (batch, 1))
        windows = trained[starts + torch.arange(positions + 1)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        kfac.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {loss.item() / math.log(2):.3f} bits per character")
    return bits_per_token(model, tested, positions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    print(f"{train(arguments.file, arguments.steps):.3f} bits per character on the last tenth")
