"""Packages that explanations need and the core does not: found, or an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from kaisa.errors import ConfigurationError


def load(module: str, purpose: str) -> Any:
    """Import a module of the extra `explain`.

    Raises:
        ConfigurationError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).split(".")[0]
        raise ConfigurationError(
            f"{purpose} needs {package}, which is not installed; pip install 'kaisa[explain]'"
        ) from error
