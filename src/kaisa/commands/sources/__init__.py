"""What `kaisa explain` explains: a model that was read from a file, posed with inputs and targets as users name them.

    source    an input is                               a target is                     the explained score
    images    a file, or the number of a test image     a class                         its output
    masks     the same                                  the object or the background    its mean logit over a region
    texts     a text, its file, or the number of one    a token                         its logit at one position
    program   a file                                    the number of an output         that output

A model of masks or of texts is given a hook that makes of its outputs one score for each target, so that every method
sees a classifier, and layers keep their names.
"""

from __future__ import annotations

from kaisa.commands.sources.masks import Masks
from kaisa.commands.sources.pictures import Pictures
from kaisa.commands.sources.posed import INFLUENCE, Asked, Place, Posed, Source
from kaisa.commands.sources.texts import Texts
from kaisa.errors import ConfigurationError
from kaisa.recipes.catalogue import IMAGES, MASKED_IMAGES, TEXT
from kaisa.recipes.programs import Program
from kaisa.recipes.trained import Trained

__all__ = ["INFLUENCE", "Asked", "Place", "Posed", "Source", "source_of", "source_of_program"]


def source_of(run: Trained) -> Source:
    """Return the source that a run is.

    Raises:
        ConfigurationError: its kind cannot be explained.
    """
    if run.kind == IMAGES:
        return Pictures(run.model, run.shape, run.classes, run)
    if run.kind == MASKED_IMAGES:
        return Masks(run)
    if run.kind == TEXT:
        return Texts(run)
    raise ConfigurationError(
        f"the run is of the recipe {run.options.recipe}, whose detections cannot be explained so far"
    )


def source_of_program(program: Program) -> Source:
    """Return the source that an exported program is."""
    return Pictures(program, program.shape)
