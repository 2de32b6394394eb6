"""The pictures and figures of docs/explanations.md: every method on one small network.

    python benchmarks/explanation_gallery.py --data cifar10-train.zip

trains a network of three convolutions on a few hundred photographs of three classes of CIFAR-10, of which 5 % are
mislabelled on purpose, explains it by every method, and writes a picture of each, one comparison and the figures.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

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
EPOCHS = 25
SEED = 0
COMPARED = (
    "saliency",
    "guided_backprop",
    "smoothgrad",
    "integrated_gradients",
    "gradcam",
    "gradcam++",
    "scorecam",
    "lime",
)
OPTIONS = {
    "anchors": {"hide": 0.0},
    "filter": {"layer": "features.6", "steps": 128, "channels": [0, 3, 6, 9], "priors": Priors(total_variation=1e-4)},
    "layer": {"layer": "features.6", "steps": 128},
    "logit": {"steps": 128},
    "deepdream": {"layer": "features.3", "low": 0.0, "high": 1.0},
    "inversion": {"layer": "features.3", "variation_weight": 1e-4},
}

FASTER = {"lime": {"samples": 200}}  # in the comparison, which asks often


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


def area_under_curve(scores: Tensor, is_wrong: Tensor) -> float:
    bad, good = scores[is_wrong], scores[~is_wrong]
    return float((bad[:, None] > good).double().mean() + 0.5 * (bad[:, None] == good).double().mean())


def named(explanation: Explanation) -> Explanation:
    """The explanation with the names of the classes."""
    details = dict(explanation.details)
    if explanation.target is not None:
        details["target_names"] = [CLASSES[index] for index in explanation.target]
    for sign in ("proponents", "opponents"):
        if f"{sign}_targets" in details:
            details[f"{sign}_names"] = [[CLASSES[label] for label in row] for row in details[f"{sign}_targets"]]
    return Explanation(**{**vars(explanation), "details": details})


def draw(explanation: Explanation, folder: Path) -> None:
    """A small picture: fewer colours make it a third as large."""
    pillow = load_extra("PIL.Image", "small pictures")
    image = pillow.open(io.BytesIO(named(explanation).png(dots_per_inch=62))).convert("RGB")
    image.quantize(96).save(folder / f"{explanation.method.replace('+', 'p')}.png", optimize=True)


def explain_everything(model: Network, train: Examples, shown: Tensor, curvature: Curvature, folder: Path) -> None:
    """A picture by each method."""
    folder.mkdir(parents=True, exist_ok=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, default=Path("docs/images/explanations"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/explanation_gallery.json"))
    parser.add_argument("--page", type=Path, help="a page of the comparison, too")
    parser.add_argument("--figures-only", action="store_true", help="no pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    clean, test = read(arguments.data)
    examples, is_wrong = mislabel(clean, generator)
    model = train(examples, generator)
    with torch.no_grad():
        accuracy = float((model(test.inputs).argmax(1) == test.targets).double().mean())
    print(f"test accuracy {accuracy:.3f}", flush=True)
    kfac = Curvature.of(model, mean_factors(model, examples.inputs.split(100), fisher="categorical"))
    ekfac = kfac.moments(model, cross_entropy, examples, sample=sample_labels, generator=generator)
    found = {
        name: area_under_curve(curvature.self_influence(model, cross_entropy, examples), is_wrong)
        for name, curvature in (("kfac", kfac), ("ekfac", ekfac))
    }
    with torch.no_grad():
        losses = functional.cross_entropy(model(examples.inputs), examples.targets, reduction="none")
    found["loss"] = area_under_curve(losses, is_wrong)
    print("planted label noise, area under the curve:", found, flush=True)
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
        "test_accuracy": accuracy,
        "label_noise_area_under_curve": found,
        "comparison": compared.figures(),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not arguments.figures_only:
        shown = test.inputs[[2, TESTS + 5]]  # an airplane and a frog
        explain_everything(model, examples, shown, ekfac, arguments.pictures)


if __name__ == "__main__":
    main()
