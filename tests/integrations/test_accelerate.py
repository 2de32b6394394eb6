"""K-FAC under Accelerate is K-FAC without it, and is in the folders that Accelerate saves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kaisa
from tests.support.plain_loop import (
    OPTIONS,
    PlainLoop,
    assert_same,
    assert_same_factors,
    classified,
    examples,
    network,
    parameters,
    sgd,
)

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from kaisa.integrations.accelerate import preconditioner  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A loop as Accelerate's documentation has it, with the three lines of K-FAC."""

    def __init__(self, dtype: torch.dtype = torch.float64, accelerator: Any = None, **options: Any) -> None:
        self.accelerator = accelerator or accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.net = network(dtype)
        self.model, self.optimizer = self.accelerator.prepare(self.net, sgd(self.net))
        self.kfac = preconditioner(self.accelerator, self.model, self.optimizer, **{**OPTIONS, **options})

    def train(self, data: tuple[Tensor, Tensor], epochs: int, clip: float | None = None) -> None:
        loader = self.accelerator.prepare(DataLoader(TensorDataset(*data), 4))
        for _ in range(epochs):
            for batch in loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(classified(self.model, batch))
                    if self.accelerator.sync_gradients:
                        self.accelerator.unscale_gradients(self.optimizer)
                        self.kfac.step()
                        if clip is not None:
                            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()


def test_accumulating_and_clipping_it_is_the_plain_loop() -> None:
    data, run = examples(20), Run()
    run.train(data, 2, clip=0.05)
    expected = network()
    kfac = PlainLoop(classified, divides_by_actual=False, clip=0.05).train(expected, data)
    assert_same(parameters(run.net), parameters(expected))
    assert_same_factors(run.kfac, kfac)


def classified_in_full(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Accelerate casts the model's outputs back, so that the loss is in float32."""
    outputs = model(batch[0]).float()
    with torch.autocast("cpu", enabled=False):
        return nn.functional.cross_entropy(outputs, batch[1])


def test_under_autocast_to_bfloat16_it_is_the_plain_loop() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    data, run = examples(16, torch.float32), Run(torch.float32, accelerator)
    run.train(data, 2)
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    kfac = PlainLoop(classified_in_full, divides_by_actual=False, autocast=autocast).train(expected, data)
    assert_same(parameters(run.net), parameters(expected))
    assert_same_factors(run.kfac, kfac)


def scaled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def with_scaler() -> Any:
    """Returns an accelerator as it is on a GPU in fp16: it refuses to be made on a CPU."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = scaled()
    return accelerator


def test_gradients_are_unscaled_and_the_factors_free_of_the_loss_scale() -> None:
    data, run = examples(16, torch.float32), Run(torch.float32, with_scaler())
    run.train(data, 2, clip=0.05)
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.float16)
    loop = PlainLoop(classified_in_full, divides_by_actual=False, clip=0.05, autocast=autocast, scaler=scaled())
    kfac = loop.train(expected, data)
    assert_same(parameters(run.net), parameters(expected))
    assert_same_factors(run.kfac, kfac)


def test_gradients_that_nobody_unscaled_are_refused() -> None:
    run = Run(torch.float32, with_scaler())
    run.accelerator.backward(classified(run.model, examples(4, torch.float32)))
    with pytest.raises(kaisa.ConfigurationError, match="the gradients are still scaled"):
        run.kfac.step()


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    data, options = examples(24), {"inv_update_steps": 4, "factor_examples": 0.5}
    whole = Run(**options)
    whole.train(data, 4)
    first = Run(**options)
    first.train(data, 2)
    first.accelerator.save_state(str(tmp_path))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    second = Run(accelerator=accelerator, **options)
    accelerator.load_state(str(tmp_path))
    second.train(data, 2)
    torch.testing.assert_close(parameters(second.net), parameters(whole.net), rtol=0, atol=0)
    assert second.kfac.steps == 12


def test_a_folder_written_again_holds_the_last_state_even_of_a_shorter_run(tmp_path: Path) -> None:
    longer = Run()
    longer.train(examples(8), 3)
    longer.accelerator.save_state(str(tmp_path))
    shorter = Run(accelerator=accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    shorter.train(examples(8), 1)
    shorter.accelerator.save_state(str(tmp_path))
    again = Run(accelerator=accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    again.accelerator.load_state(str(tmp_path))
    assert again.kfac.steps == 1


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", accelerate.DistributedType.FSDP)
    net = network()
    with pytest.raises(kaisa.ConfigurationError, match="K-FAC needs whole parameters on every rank"):
        preconditioner(accelerator, net, sgd(net))
