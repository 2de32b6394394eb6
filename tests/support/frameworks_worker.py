"""Run by torchrun: each framework trains on two ranks, stops, and goes on; rank 0 writes what came of it as JSON.

A plan: ``framework``, ``folder``, and ``options`` of the preconditioner.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.support.plain_loop import classified, examples, network, sgd

DATA = examples(32)


def by_accelerate(folder: Path, options: dict[str, Any], epochs: int, resumed: bool) -> tuple[nn.Module, int]:
    from accelerate import Accelerator

    from kaisa.integrations.accelerate import preconditioner

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = network()
    model, optimizer, loader = accelerator.prepare(net, sgd(net), DataLoader(TensorDataset(*DATA), 4))
    kfac = preconditioner(accelerator, model, optimizer, **options)
    if resumed:
        accelerator.load_state(str(folder / "accelerate"))
    for _ in range(epochs - 1 if resumed else epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(classified(model, batch))
                if accelerator.sync_gradients:
                    kfac.step()
                optimizer.step()
                optimizer.zero_grad()
    if epochs == 1:
        accelerator.save_state(str(folder / "accelerate"))
    return net, kfac.steps


def by_transformers(folder: Path, options: dict[str, Any], epochs: int, resumed: bool) -> tuple[nn.Module, int]:
    from kaisa.integrations.transformers import KFACCallback
    from tests.integrations import test_transformers as of

    net, callback = network(), KFACCallback(**options)
    saving = "epoch" if epochs == 1 else "no"
    arguments = {"num_train_epochs": epochs, "save_strategy": saving}
    fit = of.trainer(folder / "trainer", of.Classifier(net), of.Rows(DATA), callback, **arguments)
    fit.train(resume_from_checkpoint=resumed)
    assert callback.kfac is not None
    return net, callback.kfac.steps


def by_lightning(folder: Path, options: dict[str, Any], epochs: int, resumed: bool) -> tuple[nn.Module, int]:
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from kaisa.integrations.lightning import KFACCallback
    from tests.integrations import test_lightning as of

    net, callback, path = network(), KFACCallback(**options), folder / "one.ckpt"
    settings = {"strategy": "ddp", "devices": 2, "plugins": [TorchElasticEnvironment()], "max_epochs": epochs}
    settings["use_distributed_sampler"] = False  # which would shuffle
    fit = of.trainer(folder, callback, **settings)
    rows = TensorDataset(*DATA)
    sampler = DistributedSampler(rows, 2, int(os.environ["RANK"]), shuffle=False)
    loader = DataLoader(rows, 4, sampler=sampler)
    fit.fit(of.Classifier(net), loader, ckpt_path=path if resumed else None)
    if epochs == 1:
        fit.save_checkpoint(path)
    assert callback.kfac is not None
    return net, callback.kfac.steps


FRAMEWORKS = {"accelerate": by_accelerate, "transformers": by_transformers, "lightning": by_lightning}


def parameters(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def main() -> None:
    plan = json.loads(sys.argv[1])
    folder, train = Path(plan["folder"]), FRAMEWORKS[plan["framework"]]
    whole, steps = train(folder, plan["options"], 2, False)
    train(folder, plan["options"], 1, False)
    resumed, resumed_steps = train(folder, plan["options"], 2, True)
    difference = max((a - b).abs().max().item() for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    if torch.distributed.get_rank() == 0:
        result = {"steps": [steps, resumed_steps], "difference": difference}
        (folder / "result.json").write_text(json.dumps(result))
        torch.save(parameters(whole), folder / "parameters.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
