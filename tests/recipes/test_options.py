from __future__ import annotations

from dataclasses import fields
from inspect import signature

import pytest

from kaisa.commands.train import train
from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import RECIPES
from kaisa.recipes.contestants import OPTIMIZERS, Preconditioning
from kaisa.recipes.options import LEARNING_RATES, Options


def names(**given: object) -> list[str]:
    return [contestant.name for contestant in Options.complete(given).build_contestants()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rsg", "arsg"])
def test_an_optimizer_takes_part_alone_and_behind_kfac(optimizer: str) -> None:
    assert names(optimizer=optimizer) == [optimizer, f"{optimizer} + K-FAC"]
    assert names(optimizer=f"{optimizer}+kfac") == [f"{optimizer} + K-FAC"]
    assert names(optimizer=optimizer, contestants="first-order") == [optimizer]
    assert names(optimizer=optimizer, contestants="kfac") == [f"{optimizer} + K-FAC"]


def test_adahessian_takes_part_alone() -> None:
    assert names(optimizer="adahessian") == ["adahessian"]


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adahessian+kfac"},
        {"optimizer": "adahessian", "contestants": "both"},
        {"optimizer": "adahessian", "contestants": "kfac"},
    ],
)
def test_adahessian_behind_kfac_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="adahessian behind K-FAC would divide by the curvature twice"):
        Options.complete(given)


def test_what_follows_an_optimizer_must_be_kfac() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown optimizer 'arsg\+shampoo'; only \+kfac may follow a name"):
        Options.complete({"optimizer": "arsg+shampoo"})
    with pytest.raises(ConfigurationError, match=r"optimizer arsg\+kfac is for the contestant behind K-FAC alone"):
        Options.complete({"optimizer": "arsg+kfac", "contestants": "both"})


def test_every_optimizer_has_a_learning_rate_of_its_own_unless_one_is_given() -> None:
    assert LEARNING_RATES.keys() == OPTIMIZERS.keys()
    for optimizer, rate in LEARNING_RATES.items():
        assert Options.complete({"optimizer": optimizer}).lr == rate
        assert Options.complete({"optimizer": optimizer, "lr": 0.5}).lr == 0.5


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_usual_optimizer_has_the_rate_of_the_recipe_whether_it_is_given_or_not(recipe: str) -> None:
    given = {"recipe": recipe, "data": "somewhere"}
    usual = Options.complete(given)
    assert Options.complete({**given, "optimizer": usual.optimizer}) == usual
    assert Options.complete({**given, "optimizer": "adahessian"}).lr == LEARNING_RATES["adahessian"]


def test_the_rate_behind_kfac_is_checked_even_where_it_is_not_used() -> None:
    with pytest.raises(ConfigurationError, match=r"kfac-lr is -1\.0; give a positive number"):
        Options.complete({"kfac_lr": -1.0, "contestants": "first-order"})


def test_a_fisher_norm_takes_the_place_of_the_kl_clip_unless_both_are_given() -> None:
    told = Options.complete({"fisher_norm": 0.2}).to_json()["preconditioning"]
    assert (told["fisher_norm"], told["kl_clip"]) == (0.2, 0.0)
    told = Options.complete({}).to_json()["preconditioning"]
    assert (told["fisher_norm"], told["kl_clip"]) == (None, 0.001)
    with pytest.raises(ConfigurationError, match=r"kl-clip is 0\.001 and fisher-norm 0\.2"):
        Options.complete({"fisher_norm": 0.2, "kl_clip": 0.001})


def test_every_option_is_one_of_the_command() -> None:
    own = {option.name for kind in (Options, Preconditioning) for option in fields(kind)}
    assert own - {"preconditioning"} <= set(signature(train).parameters)


@pytest.mark.parametrize("given", [{"optimizer": "arsg+kfac"}, {"fisher_norm": 0.2}])
def test_options_survive_a_record(given: dict[str, object]) -> None:
    options = Options.complete(given)
    assert Options.from_json(options.to_json()) == options


@pytest.mark.parametrize("recipe", ["gpt", "bert"])
def test_a_vocabulary_has_room_for_more_than_what_stands_for_no_word(recipe: str) -> None:
    for size in (1, 2, 2.5):
        with pytest.raises(ConfigurationError, match=f"vocabulary is {size}; give a whole number of at least 3"):
            Options.complete({"recipe": recipe, "data": "x", "vocabulary": size})
    assert Options.complete({"recipe": recipe, "data": "x", "vocabulary": 3}).vocabulary == 3


USELESS: dict[str, tuple[dict[str, object], str]] = {
    "positions of images": ({"recipe": "unet", "data": "x", "positions": 8}, "unet has no use for --positions; leave"),
    "a crop of whole images": ({"data": "x", "crop": 16}, "resnet has no use for --crop; leave it out"),
    "a size of images with masks": (
        {"recipe": "unet", "data": "x", "image_size": 16},
        "unet has no use for --image-size; leave it out",
    ),
    "a size of text": ({"recipe": "bert", "data": "x", "image_size": 16}, "bert has no use for --image-size; leave"),
    "text that is mirrored": ({"recipe": "gpt", "data": "x", "augment": True}, "gpt has no use for --augment; leave"),
    "threads that read text": ({"recipe": "gpt", "data": "x", "workers": 2}, "gpt has no use for --workers; leave it"),
    "a size of the digits": ({"image_size": 16}, "digits has no use for --image-size; leave it out, or give --data"),
    "digits to test on": ({"test_data": "x"}, "digits has no use for --test-data; leave it out, or give --data"),
}


@pytest.mark.parametrize(("given", "message"), USELESS.values(), ids=USELESS)
def test_an_option_that_would_change_nothing_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the recipe {message}"):
        Options.complete(given)


def test_digits_from_files_are_resized_and_tested_on_others_and_text_may_do_without_mirrors() -> None:
    options = Options.complete({"recipe": "digits", "data": "x", "image_size": 16, "test_data": "y", "augment": True})
    assert (options.image_size, options.test_data) == (16, "y")
    assert not Options.complete({"recipe": "gpt", "data": "x", "augment": False}).augment
