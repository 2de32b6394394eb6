"""K-FAC for Transformers' BERT: hidden words of a text are to be found, in a plain loop without the Trainer.

python examples/bert.py TEXT.txt --steps 500
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import kaisa

UNKNOWN, HIDDEN, IGNORED = 0, 1, -100


def read_words(file: Path, vocabulary: int) -> tuple[Tensor, int]:
    """Returns the words of a text as numbers, and how many there are; rare ones are unknown."""
    words = file.read_text(encoding="utf-8").split()
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common(vocabulary - 2), start=2)}
    return torch.tensor([numbers.get(word, UNKNOWN) for word in words]), len(numbers) + 2


def hide(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hides as many words of each sequence; returns what is left, and the hidden ones among what is ignored."""
    places = torch.rand(tokens.shape).argsort(1)[:, :count]
    targets = torch.full_like(tokens, IGNORED).scatter(1, places, tokens.gather(1, places))
    return tokens.scatter(1, places, HIDDEN), targets


@torch.no_grad()
def mean_loss(model: torch.nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> float:
    """Returns the mean over all hidden words, of which every sequence has as many."""
    pairs = zip(inputs.split(at_once), targets.split(at_once), strict=True)
    losses = [len(some) * model(input_ids=some, labels=those).loss for some, those in pairs]
    return torch.stack(losses).sum().item() / len(inputs)


def train(file: Path, steps: int, features: int = 128, positions: int = 32, batch: int = 64) -> float:
    """Trains on nine tenths of a text; returns the loss of the hidden words in the last tenth."""
    torch.manual_seed(0)
    tokens, vocabulary = read_words(file, 8192)
    trained, tested = tokens.tensor_split([len(tokens) * 9 // 10])
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=features,
        num_hidden_layers=2,
        num_attention_heads=features // 32,
        intermediate_size=4 * features,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, steps, pct_start=0.05)
    hidden = round(0.15 * positions)
    # The loss is a mean over hidden words, not over sequences.
    kfac = kaisa.KFACPreconditioner(model, optimizer, damping=0.1, inv_update_steps=50, loss_terms=batch * hidden)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(trained) - positions, (batch, 1))
        inputs, targets = hide(trained[starts + torch.arange(positions)], hidden)
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=targets).loss
        loss.backward()
        kfac.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()
    inputs, targets = hide(tested[: len(tested) // positions * positions].reshape(-1, positions), hidden)
    return mean_loss(model, inputs, targets, batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    print(f"loss of hidden words in the last tenth: {train(arguments.file, arguments.steps):.3f}")
