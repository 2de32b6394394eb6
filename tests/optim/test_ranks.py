"""The optimizers on two ranks, held against one rank with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import optimizer_ranks

TOLERANCES = {"differences": 1e-5}  # the distance of differences is of another size where a rank lacks a layer


@pytest.mark.slow
def test_two_ranks_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    ranks = optimizer_ranks.run(2, tmp_path)
    for way in optimizer_ranks.WAYS:
        alone = optimizer_ranks.train(0, 1, way)
        tolerance = TOLERANCES.get(way, 1e-11)
        for found in ranks:
            torch.testing.assert_close(found[way], alone, rtol=tolerance, atol=tolerance)
