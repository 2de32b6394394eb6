"""K-FAC in Lightning's Trainer is K-FAC in a loop of one's own, and goes on from Lightning's checkpoints."""

from __future__ import annotations

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

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from kaisa.integrations.lightning import KFACCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
)


class Classifier(lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return classified(self, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self)


def loader(data: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(TensorDataset(*data), 4)


def trainer(folder: Path, callback: KFACCallback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[callback],
        **{"max_epochs": 2, "accumulate_grad_batches": 2, **quiet, **options},
    )


def test_accumulating_and_clipping_it_is_the_plain_loop(tmp_path: Path) -> None:
    data, model, callback = examples(20), Classifier(network()), KFACCallback(**OPTIONS)
    trainer(tmp_path, callback, gradient_clip_val=0.05).fit(model, loader(data))
    expected = network()
    kfac = PlainLoop(classified, divides_by_actual=False, clip=0.05).train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def test_a_named_submodule_is_preconditioned_under_its_own_names(tmp_path: Path) -> None:
    data, model, callback = examples(20), Classifier(network()), KFACCallback("net", **OPTIONS)
    trainer(tmp_path, callback).fit(model, loader(data))
    expected = network()
    PlainLoop(classified, divides_by_actual=False).train(expected, data)
    assert callback.kfac is not None
    assert [row.name for row in callback.kfac.coverage()] == ["0", "2"]
    assert_same(parameters(model), parameters(expected))


def test_under_autocast_to_bfloat16_it_is_the_plain_loop(tmp_path: Path) -> None:
    data, model = examples(16, torch.float32), Classifier(network(torch.float32))
    callback = KFACCallback(**OPTIONS)
    trainer(tmp_path, callback, precision="bf16-mixed").fit(model, loader(data))
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    kfac = PlainLoop(classified, divides_by_actual=False, autocast=autocast).train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def scaled(enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)


def test_gradients_are_unscaled_and_the_factors_free_of_the_loss_scale(tmp_path: Path) -> None:
    data, model = examples(16, torch.float32), Classifier(network(torch.float32))
    callback = KFACCallback(**OPTIONS)
    precision = MixedPrecision("16-mixed", "cpu", scaled())
    trainer(tmp_path, callback, plugins=[precision], gradient_clip_val=0.05).fit(model, loader(data))
    expected = network(torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.float16)
    loop = PlainLoop(classified, divides_by_actual=False, clip=0.05, autocast=autocast, scaler=scaled())
    kfac = loop.train(expected, data)
    assert_same(parameters(model), parameters(expected))
    assert_same_factors(callback.kfac, kfac)


def test_an_optimizer_that_unscales_by_itself_is_refused(tmp_path: Path) -> None:
    class Fused(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    model, callback = Fused(network(torch.float32)), KFACCallback(**OPTIONS)
    precision = MixedPrecision("16-mixed", "cpu", scaled())
    with pytest.raises(kaisa.ConfigurationError, match="the gradients are still scaled"):
        trainer(tmp_path, callback, plugins=[precision]).fit(model, loader(examples(16, torch.float32)))


def test_an_accumulation_that_changes_between_epochs_leaves_the_factors_their_scale(tmp_path: Path) -> None:
    data = examples(16)
    factors = []
    for schedule in ({0: 1}, {0: 1, 1: 2}):
        callback = KFACCallback(**{**OPTIONS, "factor_decay": 0.0})
        scheduler = lightning.callbacks.GradientAccumulationScheduler(schedule)
        model = Classifier(network())
        fit = trainer(tmp_path, callback, accumulate_grad_batches=1)
        fit.callbacks.append(scheduler)
        for parameter in model.parameters():
            parameter.register_hook(torch.zeros_like)  # the weights stay, so that all factors are of one model
        fit.fit(model, loader(data))
        assert callback.kfac is not None
        factors.append(callback.kfac)
    last, both = (kfac.factors["net.2"].g for kfac in factors)
    of_batches = [kaisa_factors(data, start) for start in (8, 12)]
    torch.testing.assert_close(last, of_batches[1])
    torch.testing.assert_close(both, (of_batches[0] + of_batches[1]) / 2)


def kaisa_factors(data: tuple[Tensor, Tensor], start: int) -> Tensor:
    """Returns G of the last layer on four examples from its formula: the mean of (softmax − one-hot)'s squares."""
    x, y = data[0][start : start + 4], data[1][start : start + 4]
    delta = network()(x).softmax(1) - nn.functional.one_hot(y, 3)
    return (delta.T @ delta / 4).detach()


def test_a_resumed_fit_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    data, options = examples(24), {**OPTIONS, "inv_update_steps": 4, "factor_examples": 0.5}
    whole, callback = Classifier(network()), KFACCallback(**options)
    trainer(tmp_path, callback, max_epochs=4).fit(whole, loader(data))

    first, second = Classifier(network()), Classifier(network())
    begun = trainer(tmp_path, KFACCallback(**options), max_epochs=2)
    begun.fit(first, loader(data))
    begun.save_checkpoint(tmp_path / "half.ckpt")
    resumed = KFACCallback(**options)
    trainer(tmp_path, resumed, max_epochs=4).fit(second, loader(data), ckpt_path=tmp_path / "half.ckpt")

    torch.testing.assert_close(parameters(second), parameters(whole), rtol=0, atol=0)
    assert resumed.kfac is not None
    assert resumed.kfac.steps == 12


def test_the_checkpoint_is_read_without_running_code_of_its_maker(tmp_path: Path) -> None:
    fit = trainer(tmp_path, KFACCallback(**OPTIONS), max_epochs=1)
    fit.fit(Classifier(network()), loader(examples(8)))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert state["callbacks"]["KFACCallback"]["ranks"][0]["steps"] == 1


def test_a_state_of_more_ranks_is_refused(tmp_path: Path) -> None:
    callback = KFACCallback(**OPTIONS)
    callback.load_state_dict({"ranks": [{}, {}]})
    with pytest.raises(kaisa.StateError, match="of 2 ranks, but there are 1"):
        trainer(tmp_path, callback).fit(Classifier(network()), loader(examples(8)))


def test_two_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [sgd(self), sgd(self)]

    with pytest.raises(kaisa.ConfigurationError, match="returned 2 optimizers"):
        trainer(tmp_path, KFACCallback(), accumulate_grad_batches=1).fit(Two(network()), loader(examples(8)))


def test_no_hook_stays_when_the_fit_ends_or_fails(tmp_path: Path) -> None:
    model = Classifier(network())
    trainer(tmp_path, KFACCallback(**OPTIONS), max_epochs=1).fit(model, loader(examples(8)))

    class Failing(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("a fault of the user's")

    broken = trainer(tmp_path, KFACCallback(**OPTIONS), max_epochs=1)
    broken.callbacks.append(Failing())
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        broken.fit(model, loader(examples(8)))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
