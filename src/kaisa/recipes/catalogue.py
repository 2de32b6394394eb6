"""The recipes: on which kind of data which models are trained, for which task and with which usual settings.

    recipe     data                            models                               raced for
    digits     handwritten digits              small image models                   accuracy
    logistic   the same, or images             multinomial logistic regression      loss
    mlp        the same, or images             a perceptron                         loss
    resnet     images, a subfolder a class     ResNet-20 to -152                    accuracy
    unet       images with masks               U-Net                                Dice
    gpt        text                            GPT-2, small to published            bits per token
    bert       text                            BERT, tiny to large                  MLM loss
    maskrcnn   images with their objects       Mask R-CNN                           box mAP

Small transformers have heads of 32 features, the published ones of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from kaisa.errors import ConfigurationError
from kaisa.recipes import language_models as language
from kaisa.recipes import tasks
from kaisa.recipes.detectors import MaskRCNN
from kaisa.recipes.imagenet_resnets import resnet18, resnet50, resnet101, resnet152
from kaisa.recipes.language_models import Gpt2, Width
from kaisa.recipes.masked_language import initialize_language_, masked_bert
from kaisa.recipes.models import MODELS as SMALL_MODELS
from kaisa.recipes.models import Shape
from kaisa.recipes.tasks import Task
from kaisa.recipes.unet import UNet

IMAGES, MASKED_IMAGES, TEXT, SCENES = "images", "masked images", "text", "scenes"

Builder = Callable[..., nn.Module]
"""Makes a model: of images by shape and classes, of masked images by shape, of text by tokens and positions, of scenes
by classes and the shorter side of an image."""


def _large(build: Callable[[int, int], nn.Module]) -> Builder:
    return lambda shape, classes: build(classes, shape[0])


def _unet(width: int) -> Builder:
    def build(shape: Shape) -> nn.Module:
        return UNet(shape[0], width)

    return build


def _width(blocks: int, features: int) -> Width:
    """Return the width of a small transformer; its tokens and positions are those of the data."""
    return Width(blocks, features, features // 32, 4 * features, 0, 0)


def _text_model(make: Callable[[Width], nn.Module], width: Width, tokens: int, positions: int) -> nn.Module:
    return make(Width(width.blocks, width.features, width.heads, width.hidden, tokens, positions))


def _gpt(width: Width) -> Builder:
    return partial(_text_model, lambda whole: initialize_language_(Gpt2(whole)), width)


def _bert(width: Width) -> Builder:
    return partial(_text_model, masked_bert, width)


IMAGE_MODELS: dict[str, Builder] = {
    **SMALL_MODELS,
    "resnet18": _large(resnet18),
    "resnet50": _large(resnet50),
    "resnet101": _large(resnet101),
    "resnet152": _large(resnet152),
}
UNETS: dict[str, Builder] = {f"unet{width}": _unet(width) for width in (8, 4, 16, 32, 64)}
GPTS: dict[str, Builder] = {
    "gpt-nano": _gpt(_width(2, 64)),
    "gpt-tiny": _gpt(_width(2, 128)),
    "gpt-mini": _gpt(_width(4, 128)),
    "gpt-small": _gpt(_width(6, 256)),
    "gpt2": _gpt(language.GPT2),
}
BERTS: dict[str, Builder] = {
    "bert-tiny": _bert(_width(2, 128)),
    "bert-nano": _bert(_width(2, 64)),
    "bert-mini": _bert(_width(4, 256)),
    "bert-base": _bert(language.BERT_BASE),
    "bert-large": _bert(language.BERT_LARGE),
}
DETECTORS: dict[str, Builder] = {
    "maskrcnn-resnet50": MaskRCNN("resnet50"),
    "maskrcnn-resnet18": MaskRCNN("resnet18"),
}


@dataclass(frozen=True)
class Recipe:
    """A kind of training.

    Attributes:
        task: loss and scores.
        kind: of data.
        models: by name, the usual one first.
        preset: what is taken for options that are not given; ``lr`` is for the ``optimizer`` beside it.
        has_data: whether it has data of its own for when none are given.
    """

    task: Task
    kind: str
    models: Mapping[str, Builder]
    preset: Mapping[str, Any]
    has_data: bool = False


_DIGITS: dict[str, Any] = {
    "model": "cnn",
    "epochs": 30,
    "batch_size": 128,
    "damping": 0.01,
    "factor_update_steps": 10,
    "inv_update_steps": 20,
    "solver": "cholesky",
    "repeats": 5,
    "target": 0.97,
    "threads": 1,
}
_IMAGES: dict[str, Any] = {"model": "resnet20", "epochs": 20, "batch_size": 128, "augment": True}
_LOSS = {**_DIGITS, "repeats": 1, "target": None}

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(tasks.CLASSIFICATION, IMAGES, IMAGE_MODELS, _DIGITS, has_data=True),
    "logistic": Recipe(tasks.REGRESSION, IMAGES, IMAGE_MODELS, {**_LOSS, "model": "logistic"}, has_data=True),
    "mlp": Recipe(tasks.REGRESSION, IMAGES, IMAGE_MODELS, {**_LOSS, "model": "mlp"}, has_data=True),
    "resnet": Recipe(tasks.CLASSIFICATION, IMAGES, IMAGE_MODELS, _IMAGES),
    "unet": Recipe(
        tasks.SEGMENTATION,
        MASKED_IMAGES,
        UNETS,
        {
            "model": "unet8",
            "epochs": 8,
            "batch_size": 16,
            "optimizer": "adamw",
            "lr": 0.003,
            "augment": True,
            "crop": 128,
            "factor_update_steps": 5,
            "inv_update_steps": 20,
        },
    ),
    "gpt": Recipe(
        tasks.NEXT_TOKEN,
        TEXT,
        GPTS,
        {
            "model": "gpt-mini",
            "epochs": 3,
            "batch_size": 32,
            "optimizer": "adamw",
            "lr": 0.003,
            "positions": 128,
            "unit": "characters",
            "vocabulary": 256,
            "inv_update_steps": 50,
        },
    ),
    "bert": Recipe(
        tasks.MASKED_TOKEN,
        TEXT,
        BERTS,
        {
            "model": "bert-tiny",
            "epochs": 4,
            "batch_size": 64,
            "optimizer": "adamw",
            "lr": 0.003,
            "damping": 0.1,
            "positions": 32,
            "unit": "characters",
            "vocabulary": 256,
            "inv_update_steps": 50,
        },
    ),
    "maskrcnn": Recipe(
        tasks.DETECTION,
        SCENES,
        DETECTORS,
        {
            "model": "maskrcnn-resnet50",
            "epochs": 12,
            "batch_size": 4,
            "lr": 0.01,
            "weight_decay": 1e-4,
            "augment": True,
            "image_size": 800,
            "parts": "roi_heads",
            "factor_update_steps": 10,
            "inv_update_steps": 100,
        },
    ),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def find_model(recipe: str, name: str) -> Builder:
    """Return what builds a model of a recipe.

    Raises:
        ConfigurationError: there is no such recipe, or it has no model of that name.
    """
    models = find_recipe(recipe).models
    if name not in models:
        raise ConfigurationError(f"unknown model {name!r}; choose from {', '.join(models)}")
    return models[name]
