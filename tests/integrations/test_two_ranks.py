"""Each framework, on two ranks with owner-sharded factors, trains as one process on both parts, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kaisa
from tests.support.plain_loop import OPTIONS, assert_same, classified, examples, network, parameters, sgd
from tests.support.torchrun import torchrun


def on_one_process() -> list[Tensor]:
    """Trains on what both ranks see in a step at once: two micro-batches of four from each of them."""
    model = network()
    optimizer = sgd(model)
    kfac = kaisa.KFACPreconditioner(model, optimizer, **OPTIONS)
    data = examples(32)
    for _ in range(2):
        for rows in torch.arange(32).split(16):
            # Batches go to the ranks in turn, or examples do: 16 in a row are the same step either way.
            optimizer.zero_grad()
            classified(model, (data[0][rows], data[1][rows])).backward()
            kfac.step()
            optimizer.step()
    return parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["accelerate", "transformers", "lightning"])
def test_two_ranks_train_as_one_process_and_a_resumed_run_as_an_uninterrupted_one(
    tmp_path: Path, framework: str
) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    plan = {"framework": framework, "options": {**OPTIONS, "grad_worker_fraction": "mem"}}
    with torchrun(tmp_path, plan, worker="frameworks_worker.py") as world:
        assert world.wait(300) == 0, world.log
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"steps": [4, 4], "difference": 0.0}
    assert_same(torch.load(tmp_path / "parameters.pt"), on_one_process())
