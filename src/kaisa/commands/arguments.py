"""How the commands write their options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from kaisa.errors import ConfigurationError

MACHINE = "Machine"


def option(text: str, *names: str, panel: str) -> Any:
    """Return an option whose text tells its default in brackets."""
    return typer.Option(*names, help=escape(text), rich_help_panel=panel, show_default=False)  # brackets are no markup


def check_writable(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work and not after it.

    Raises:
        ConfigurationError: the path is a folder, or its folder does not exist.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigurationError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}")
