"""The pictures and figures of docs/explanations.md: every method on a small network, some on a table and on texts.

    python benchmarks/explanation_gallery.py --data cifar10-train.zip

trains a network of three convolutions on a few hundred photographs of three classes of CIFAR-10, of which 5 % are
mislabelled on purpose, explains it by every method, and writes a picture of each, one comparison and the figures. Then
a forest learns to tell wines by their chemistry, and a network of words whether a sentence praises: they are explained
by the methods that fit them.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.explain import Curvature, Effort, Examples, Explanation, Priors, compare, explain, methods
from kaisa.explain.influence import cross_entropy, sample_labels
from kaisa.kfac import mean_factors
from kaisa.recipes.extras import load_extra
from kaisa.recipes.images import decode_image, list_classes, open_tree
from kaisa.recipes.record import describe_machine, describe_versions, find_commit

CLASSES = ("airplane", "frog", "ship")
EXAMPLES, TESTS = 300, 60  # of each class
WRONG = 0.05
VERDICTS = ("blame", "praise")
EPOCHS = 25
SEED = 0
COMPARED = (
    "saliency",
    "guided_backprop",
    "smoothgrad",
    "guided_smoothgrad",
    "integrated_gradients",
    "guided_integrated_gradients",
    "gradcam",
    "gradcam++",
    "scorecam",
    "lime",
    "cle",
    "kernelshap",
    "anchors",
)
OPTIONS = {
    "anchors": {"hide": 0.0},
    "filter": {"layer": "features.6", "steps": 128, "channels": [6, 9, 11, 12], "priors": Priors(total_variation=1e-4)},
    "layer": {"layer": "features.6", "steps": 128},
    "logit": {"steps": 128},
    "deepdream": {"layer": "features.7", "steps": 3, "rate": 0.02, "low": 0.0, "high": 1.0},
    "inversion": {"layer": "features.3", "variation_weight": 1e-4},
}

# In the comparison, which asks often.
FASTER = {
    "lime": {"samples": 200},
    "cle": {"samples": 200},
    "kernelshap": {"samples": 200},
    "anchors": {"hide": 0.0, "batch": 20, "tolerance": 0.5, "beam": 1, "certificate_samples": 100, "longest": 4},
}
WINES = {
    "lime": {"samples": 2000},
    "cle": {"samples": 2000, "limit": 40},
    "kernelshap": {"samples": 1000},
    "anchors": {"beam": 2},
}
THINGS = ("plot", "acting", "music", "story", "film", "ending")
ADJECTIVES = {"good": 1, "great": 1, "lovely": 1, "fine": 1, "bad": -1, "dull": -1, "awful": -1, "weak": -1}
WORDS = ("UNK", "the", "was", "not", "very", "and", "but", *THINGS, *ADJECTIVES)
SENTENCES = (
    "the acting was lovely but the plot was not very good",
    "the film was not bad and the ending was very lovely",
)
BY_TOKEN = ("saliency", "guided_backprop", "smoothgrad", "integrated_gradients", "gradcam", "gradcam++")
BY_WORD = ("lime", "cle", "kernelshap", "anchors")


class Network(nn.Module):
    """Three convolutions and a linear layer on a grid of four places; its inputs are images from 0 to 1."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        ]
        self.features = nn.Sequential(*convolutions)
        self.head = nn.Linear(8 * width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.features(4 * x - 2), 2).flatten(1))


class Reader(nn.Module):
    """Words in their neighbourhoods: an embedding, a convolution over five, the largest answer of each channel."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.neighbourhoods = nn.Conv1d(width, 2 * width, 5, padding=2)
        self.relu = nn.ReLU()
        self.head = nn.Linear(2 * width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.relu(self.neighbourhoods(self.embedding(tokens).mT)).amax(2))


def read(path: Path) -> tuple[Examples, Examples]:
    """The first photographs of each class to learn from, the next to test on."""
    pixels: list[list[Tensor]] = [[], []]
    with open_tree(path) as tree:
        members = list_classes(tree.names, path)
        for name in CLASSES:
            images = [decode_image(tree.read(member), member) for member in members[name][: EXAMPLES + TESTS]]
            stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
            pixels[0].append(stacked[:EXAMPLES])
            pixels[1].append(stacked[EXAMPLES:])
    sizes = (EXAMPLES, TESTS)
    labels = [torch.arange(len(CLASSES)).repeat_interleave(size) for size in sizes]
    train, test = (Examples(torch.cat(parts), label) for parts, label in zip(pixels, labels, strict=True))
    return train, test


def mislabel(examples: Examples, generator: torch.Generator) -> tuple[Examples, Tensor]:
    """The examples with some wrong labels, and which those are."""
    count = round(WRONG * len(examples))
    chosen = torch.randperm(len(examples), generator=generator)[:count]
    labels, is_wrong = examples.targets.clone(), torch.zeros(len(examples), dtype=torch.bool)
    labels[chosen] = (labels[chosen] + torch.randint(1, len(CLASSES), (count,), generator=generator)) % len(CLASSES)
    is_wrong[chosen] = True
    return Examples(examples.inputs, labels), is_wrong


def train(examples: Examples, generator: torch.Generator) -> Network:
    torch.manual_seed(SEED)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(examples), generator=generator).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(examples.inputs[rows]), examples.targets[rows]).backward()
            optimizer.step()
    return model.eval()


def write_sentence(random: np.random.Generator) -> tuple[str, int]:
    """A sentence of two clauses, and whether it praises: "very" counts twice, and "not" turns praise into blame."""
    words: list[str] = []
    total = 0
    for _ in range(2):
        adjective, is_negated, is_strong = random.choice(list(ADJECTIVES)), random.random() < 0.4, random.random() < 0.4
        words += ["the", random.choice(THINGS), "was", *["not"] * is_negated, *["very"] * is_strong, str(adjective)]
        words.append(random.choice(("and", "but")))
        total += ADJECTIVES[str(adjective)] * (1 + is_strong) * (-1 if is_negated else 1)
    return " ".join(words[:-1]), int(total > 0) if total else -1


def tokens_of(texts: Sequence[str]) -> Tensor:
    """Ids of the words, filled up with the unknown one."""
    ids = [torch.tensor([WORDS.index(word) if word in WORDS else 0 for word in text.split()] or [0]) for text in texts]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)


def teach_reader() -> tuple[Reader, float]:
    """A reader of 3000 sentences, and its accuracy on 1000 others."""
    random = np.random.default_rng(SEED)
    drawn = [pair for pair in (write_sentence(random) for _ in range(8000)) if pair[1] >= 0][:4000]
    tokens, labels = tokens_of([text for text, _ in drawn]), torch.tensor([label for _, label in drawn])
    torch.manual_seed(SEED)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), 5e-3)
    for _ in range(8):
        for rows in torch.randperm(3000).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(reader(tokens[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return reader.eval(), float((reader(tokens[3000:]).argmax(1) == labels[3000:]).double().mean())


def explain_sentences(folder: Path) -> dict[str, Any]:
    """A picture by each method that explains words; and the figures of quality."""
    reader, accuracy = teach_reader()
    found: dict[str, Any] = {"test_accuracy": accuracy}
    for name in BY_TOKEN:
        words = [sentence.split() for sentence in SENTENCES]
        said = explain(reader, tokens_of(SENTENCES), name, names=words, seed=SEED, progress=False)
        found[name] = draw(said, folder, "words", VERDICTS)
    for name in BY_WORD:
        ask = lambda texts: reader(tokens_of(texts)).softmax(1).detach()  # noqa: E731
        found[name] = draw(explain(ask, SENTENCES, name, seed=SEED, progress=False), folder, "words", VERDICTS)
    return found


def explain_wine(folder: Path) -> dict[str, Any]:
    """A picture by each method that explains rows of a table; and the figures of quality."""
    wines = load_extra("sklearn.datasets", "the table").load_wine()
    order = np.random.default_rng(SEED).permutation(len(wines.data))
    seen, new = order[:120], order[120:]
    forest = load_extra("sklearn.ensemble", "the forest").RandomForestClassifier(
        100, min_samples_leaf=3, random_state=SEED
    )
    forest.fit(wines.data[seen], wines.target[seen])
    chances = forest.predict_proba(wines.data[new])
    row = wines.data[new[chances.max(1).argmax()]][None]
    names = [
        name.replace("_", " ").replace("od280/od315 of diluted wines", "od280/od315") for name in wines.feature_names
    ]
    found: dict[str, Any] = {"test_accuracy": float(forest.score(wines.data[new], wines.target[new]))}
    for name, options in WINES.items():
        against = {"background": wines.data[seen][::4]} if name == "kernelshap" else {"training": wines.data[seen]}
        said = explain(
            forest.predict_proba,
            row,
            name,
            names=names,
            seed=SEED,
            batch_size=4096,
            progress=False,
            **options,
            **against,
        )
        found[name] = draw(said, folder, "wine", [f"cultivar {number}" for number in range(3)])
    return found


def area_under_curve(scores: Tensor, is_wrong: Tensor) -> float:
    bad, good = scores[is_wrong], scores[~is_wrong]
    return float((bad[:, None] > good).double().mean() + 0.5 * (bad[:, None] == good).double().mean())


def named(explanation: Explanation, classes: Sequence[str]) -> Explanation:
    """The explanation with the names of the classes."""
    details = dict(explanation.details)
    if explanation.target is not None:
        details["target_names"] = [classes[index] for index in explanation.target]
    for sign in ("proponents", "opponents"):
        if f"{sign}_targets" in details:
            details[f"{sign}_names"] = [[classes[label] for label in row] for row in details[f"{sign}_targets"]]
    return Explanation(**{**vars(explanation), "details": details})


def draw(
    explanation: Explanation, folder: Path, prefix: str = "", classes: Sequence[str] = CLASSES
) -> dict[str, float]:
    """A small picture, of few colours: a third as large; and the mean of each figure of quality."""
    pillow = load_extra("PIL.Image", "small pictures")
    image = pillow.open(
        io.BytesIO(named(explanation, classes).png(dots_per_inch=62 if explanation.kind == "map" else 74))
    ).convert("RGB")
    name = "_".join(filter(None, (prefix, explanation.method.replace("+", "p"))))
    image.quantize(96).save(folder / f"{name}.png", optimize=True)
    return {figure: sum(each) / len(each) for figure, each in explanation.quality.items()}


def explain_everything(model: Network, train: Examples, shown: Tensor, curvature: Curvature, folder: Path) -> None:
    """A picture by each method."""
    for name in methods():
        start = time.perf_counter()
        options = dict(OPTIONS.get(name, {}))
        inputs, target = shown, None
        if name in ("filter", "layer", "logit"):
            inputs, options = None, {**options, "input_shape": (3, 32, 32), "low": 0.0, "high": 1.0}
            target = list(range(len(CLASSES))) if name == "logit" else None
        if name == "influence":
            options = {"training": train, "curvature": curvature}
        draw(explain(model, inputs, name, target, seed=SEED, progress=False, **options), folder)
        print(f"{name:<28} {time.perf_counter() - start:6.1f} s", flush=True)


def find_label_noise(
    model: Network, examples: Examples, is_wrong: Tensor, kfac: Curvature, ekfac: Curvature
) -> dict[str, float]:
    """How well wrong labels are found: by self-influence with K-FAC and EKFAC, and by the plain loss."""
    found = {
        name: area_under_curve(curvature.self_influence(model, cross_entropy, examples), is_wrong)
        for name, curvature in (("kfac", kfac), ("ekfac", ekfac))
    }
    with torch.no_grad():
        losses = functional.cross_entropy(model(examples.inputs), examples.targets, reduction="none")
    found["loss"] = area_under_curve(losses, is_wrong)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, default=Path("docs/images/explanations"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/explanation_gallery.json"))
    parser.add_argument("--page", type=Path, help="a page of the comparison, too")
    parser.add_argument("--pictures-only", action="store_true", help="no comparison, and no file of figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    wine, sentences = explain_wine(arguments.pictures), explain_sentences(arguments.pictures)
    print(f"wine {wine}\nsentences {sentences}", flush=True)
    generator = torch.Generator().manual_seed(SEED)
    clean, test = read(arguments.data)
    examples, is_wrong = mislabel(clean, generator)
    model = train(examples, generator)
    with torch.no_grad():
        accuracy = float((model(test.inputs).argmax(1) == test.targets).double().mean())
    print(f"test accuracy {accuracy:.3f}", flush=True)
    kfac = Curvature.of(model, mean_factors(model, examples.inputs.split(100), fisher="categorical"))
    ekfac = kfac.moments(model, cross_entropy, examples, sample=sample_labels, generator=generator)
    found = find_label_noise(model, examples, is_wrong, kfac, ekfac)
    print("planted label noise, area under the curve:", found, flush=True)
    shown = test.inputs[[2, TESTS + 5]]  # an airplane and a frog
    explain_everything(model, examples, shown, ekfac, arguments.pictures)
    if arguments.pictures_only:
        return
    effort = Effort(changes=32, neighbours=1, points=11)
    told = lambda done, total: print(f"compared {done} of {total}", flush=True)  # noqa: E731
    compared = compare(model, test.inputs[::30], COMPARED, options=FASTER, effort=effort, seed=SEED, progress=told)
    print(compared, flush=True)
    if arguments.page:
        compared.save(arguments.page)
    record = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": find_commit(),
        "seed": SEED,
        "processor_seconds": time.process_time(),
        "test_accuracy": accuracy,
        "label_noise_area_under_curve": found,
        "comparison": compared.figures(),
        "wine": wine,
        "sentences": sentences,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
