"""A page as a real browser draws it, without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def photograph(page: Path, folder: Path) -> NDArray[Any]:
    """Return the pixels (1400, 1200, 3) of a page; what it would ask the network for would be missing from them."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    assert BROWSER is not None
    shot = folder / "shot.png"
    shared = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    wide = [*shared, "--window-size=1200,1400", f"--screenshot={shot}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    subprocess.run([*wide, page.as_uri()], check=True, capture_output=True, timeout=120)
    return np.asarray(image.open(shot).convert("RGB")).astype(int)
