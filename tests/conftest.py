"""What every test shares: one thread, a fresh seed, and where the real data may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("the real data (../shared/data) is absent")
    return REAL_DATA
