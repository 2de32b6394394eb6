"""Packages of the extras: found, or an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from kaisa.errors import ConfigurationError


def load_extra(module: str, purpose: str, extra: str = "train") -> Any:
    """Import a module that the core of the library does not need.

    Raises:
        ConfigurationError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ConfigurationError(
            f"{purpose} needs {package}, which is not installed; pip install 'kaisa[{extra}]'"
        ) from error
