"""The models that can be planned by name, each with the inputs that it is usually trained on.

Models are built on the meta device: they have shapes and no storage, so that one that is larger than this machine
is planned in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kaisa.errors import ConfigurationError
from kaisa.recipes import language_models as language
from kaisa.recipes.imagenet_resnets import resnet18, resnet50, resnet101, resnet152
from kaisa.recipes.models import MODELS as IMAGE_MODELS
from kaisa.recipes.models import Shape

SMALL_IMAGE: Shape = (3, 32, 32)
SMALL_CLASSES = 10
IMAGENET_IMAGE: Shape = (3, 224, 224)


@dataclass(frozen=True)
class Planned:
    """A model that is planned by name.

    Attributes:
        build: makes the model, on the device that is set.
        inputs: makes the arguments of its forward pass for so many examples, on the device that is set.
        batch: examples a rank, as it is usually trained.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batch: int

    def on_meta(self, batch: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Return the model and its inputs without storage; ``batch`` is the usual one unless given."""
        with torch.device("meta"):
            return self.build(), self.inputs(self.batch if batch is None else batch)


def _images(shape: Shape, batch: int) -> tuple[Tensor, ...]:
    return (torch.zeros(batch, *shape),)


def _tokens(positions: int, arguments: int, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(batch, positions, dtype=torch.long) for _ in range(arguments))


def _small(name: str) -> Planned:
    return Planned(lambda: IMAGE_MODELS[name](SMALL_IMAGE, SMALL_CLASSES), partial(_images, SMALL_IMAGE), 128)


def _imagenet(build: Callable[[], nn.Module], batch: int = 32) -> Planned:
    return Planned(build, partial(_images, IMAGENET_IMAGE), batch)


def _language(
    model: Callable[[language.Width], nn.Module], width: language.Width, positions: int, batch: int, arguments: int = 1
) -> Planned:
    return Planned(partial(model, width), partial(_tokens, positions, arguments), batch)


MODELS: dict[str, Planned] = {
    **{name: _small(name) for name in IMAGE_MODELS},
    "resnet18": _imagenet(resnet18),
    "resnet50": _imagenet(resnet50),
    "resnet101": _imagenet(resnet101),
    "resnet152": _imagenet(resnet152, batch=24),
    "bert-base": _language(language.Bert, language.BERT_BASE, 512, 8, arguments=2),
    "bert-large": _language(language.Bert, language.BERT_LARGE, 512, 8, arguments=2),
    "gpt2": _language(language.Gpt2, language.GPT2, 1024, 8),
    "gpt2-xl": _language(language.Gpt2, language.GPT2_XL, 1024, 4),
    "llama-1b": _language(language.Llama, language.LLAMA_1B, 2048, 4),
    "llama-8b": _language(language.Llama, language.LLAMA_8B, 2048, 1),
}
"""Small image models for 3 by 32 by 32 pixels and 10 classes, those for ImageNet, and language models.

Batches are those of the KAISA paper where it names them: 32 images a rank, 24 for ResNet-152, 8 sequences of 512.
"""


def planned_model(name: str) -> Planned:
    """Return the model of a name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in MODELS:
        raise ConfigurationError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name]
