"""K-FAC in Transformers' Trainer is K-FAC in a loop of one's own, and goes on from the Trainer's checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from kaisa.integrations.transformers import KFACCallback  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Classifier(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": classified(self.net, (x, labels))}


class Rows(Dataset):
    def __init__(self, data: tuple[Tensor, Tensor], name: str = "x") -> None:
        self.data = data
        self.name = name

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.name: self.data[0][index], "labels": self.data[1][index]}


class InOrder(transformers.Trainer):
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.train_dataset, 4))


def trainer(
    folder: Path, model: nn.Module, rows: Dataset, callback: KFACCallback, kind: type = InOrder, **arguments: Any
) -> Any:
    arguments = {"max_grad_norm": 0, "num_train_epochs": 2, "save_strategy": "no", **arguments}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        **arguments,
    )
    return kind(model=model, args=args, train_dataset=rows, callbacks=[callback], optimizers=(sgd(model), None))


def test_accumulating_and_clipping_it_is_the_plain_loop(tmp_path: Path) -> None:
    data, model, callback = examples(20), Classifier(network()), KFACCallback(max_grad_norm=0.05, **OPTIONS)
    trainer(tmp_path, model, Rows(data), callback).train()
    expected = network()
    kfac = PlainLoop(classified, divides_by_actual=True, clip=0.05).train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def test_under_autocast_to_bfloat16_it_is_the_plain_loop(tmp_path: Path) -> None:
    data, model = examples(16, torch.float32), Classifier(network(torch.float32))
    callback = KFACCallback(**OPTIONS)
    trainer(tmp_path, model, Rows(data), callback, bf16=True).train()
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    kfac = PlainLoop(classified, divides_by_actual=True, autocast=autocast).train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def scaled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_gradients_are_unscaled_and_the_factors_free_of_the_loss_scale(tmp_path: Path) -> None:
    data, model = examples(16, torch.float32), Classifier(network(torch.float32))
    callback = KFACCallback(max_grad_norm=0.05, **OPTIONS)
    fit = trainer(tmp_path, model, Rows(data), callback)
    # As on a GPU in fp16, which Accelerate refuses on a CPU.
    fit.accelerator.state._mixed_precision = "fp16"
    fit.accelerator.native_amp = True
    fit.accelerator.scaler = scaled()
    fit.train()
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.float16)
    loop = PlainLoop(classified, divides_by_actual=True, clip=0.05, autocast=autocast, scaler=scaled())
    kfac = loop.train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=6,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return transformers.GPT2LMHeadModel(config).double()


def texts(count: int) -> tuple[Tensor, Tensor]:
    """Returns tokens (count, 6), and them as labels with some left out, not equally many everywhere."""
    tokens = torch.randint(11, (count, 6), generator=torch.Generator().manual_seed(2))
    left_out = torch.rand(count, 6, generator=torch.Generator().manual_seed(3)) < 0.3
    left_out[:, 0] = True  # which no token predicts, though some versions of the Trainer count it
    return tokens, tokens.masked_fill(left_out, -100)


def test_a_language_model_has_the_factors_of_its_loss_per_token(tmp_path: Path) -> None:
    tokens, labels = texts(20)
    # A position's embedding is looked up once for all texts at hand, so that its factors depend on how many there are.
    options: dict[str, Any] = {**OPTIONS, "factor_decay": 0.0, "skip_layers": "wpe"}
    model, callback = language_model(), KFACCallback(loss_terms="labels", **options)
    trainer(tmp_path, model, Rows((tokens, labels), "input_ids"), callback, max_steps=2).train()

    expected = language_model()
    optimizer = sgd(expected)
    # All of a step in one backward pass, so that nothing is accumulated.
    terms = [float(labels[start : start + 8, 1:].ne(-100).sum()) for start in (0, 8)]
    kfac = kaisa.KFACPreconditioner(expected, optimizer, loss_terms=lambda step: terms[step], **options)
    for start in (0, 8):
        optimizer.zero_grad()
        logits = expected(tokens[start : start + 8]).logits[:, :-1].float()  # as Transformers takes the loss
        nn.functional.cross_entropy(logits.flatten(0, 1), labels[start : start + 8, 1:].flatten()).backward()
        kfac.step()
        optimizer.step()
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def test_a_language_model_whose_terms_are_not_told_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, language_model(), Rows(texts(8), "input_ids"), KFACCallback(**OPTIONS))
    with pytest.raises(kaisa.ConfigurationError, match=r"the labels have the shape \(4, 6\).*loss_terms='labels'"):
        fit.train()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path, elsewhere: bool) -> None:
    data, options = examples(20), {**OPTIONS, "inv_update_steps": 4, "factor_examples": 0.5}
    whole = Classifier(network())
    arguments: dict[str, Any] = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path / "whole", whole, Rows(data), KFACCallback(**options), transformers.Trainer, **arguments).train()

    checkpoint = tmp_path / "whole" / "checkpoint-5"  # in the middle of the second epoch
    second = Classifier(network())
    resumed = KFACCallback(resume_from=checkpoint if elsewhere else None, **options)
    folder = tmp_path / ("elsewhere" if elsewhere else "whole")
    fit = trainer(folder, second, Rows(data), resumed, transformers.Trainer, **arguments)
    fit.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(parameters(second), parameters(whole), rtol=0, atol=0)
    assert resumed.kfac is not None
    assert resumed.kfac.steps == 12


def test_a_checkpoint_of_another_run_or_without_kfac_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_train_epochs": 1, "save_strategy": "epoch"}
    for name, count in (("own", 8), ("other", 4)):
        rows = Rows(examples(count))
        trainer(tmp_path / name, Classifier(network()), rows, KFACCallback(**OPTIONS), **arguments).train()
    again = {"num_train_epochs": 2, "save_strategy": "no"}
    fit = trainer(tmp_path / "own", Classifier(network()), Rows(examples(8)), KFACCallback(**OPTIONS), **again)
    with pytest.raises(kaisa.StateError, match="checkpoint-1 does not hold K-FAC at step 1 of this run"):
        fit.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1"))
    shutil.rmtree(tmp_path / "own" / "checkpoint-1" / "kaisa")
    fit = trainer(tmp_path / "own", Classifier(network()), Rows(examples(8)), KFACCallback(**OPTIONS), **again)
    with pytest.raises(kaisa.StateError, match="it was written without"):
        fit.train(resume_from_checkpoint=str(tmp_path / "own" / "checkpoint-1"))


def test_clipping_by_the_trainer_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, Classifier(network()), Rows(examples(8)), KFACCallback(**OPTIONS), max_grad_norm=0.7)
    with pytest.raises(kaisa.ConfigurationError, match=r"would clip at 0.7 before K-FAC.*KFACCallback\(max_grad_norm"):
        fit.train()


def test_no_hook_stays_when_training_ends(tmp_path: Path) -> None:
    model = Classifier(network())
    trainer(tmp_path, model, Rows(examples(8)), KFACCallback(**OPTIONS)).train()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
