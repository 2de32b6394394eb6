"""K-FAC as a callback of Transformers' ``Trainer``.

    forward, backward, for each micro-batch ─► unscale ─► [on_pre_optimizer_step: K-FAC ─► clip] ─► optimizer.step

The Trainer itself clips before any callback is asked, that is raw gradients, whose length K-FAC undoes; the callback
clips in its place. It writes the state of K-FAC, of all ranks, to a folder in each checkpoint of the Trainer.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import kaisa
from kaisa.errors import ConfigurationError, StateError
from kaisa.integrations.micro_batches import MicroBatches
from kaisa.kfac import checkpoint

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ConfigurationError(f"{error.name} is not installed; pip install 'kaisa[transformers]'") from error

LABELS = "labels"
_FOLDER = "kaisa"
_NO_LABEL = -100


class KFACCallback(TrainerCallback):  # type: ignore[misc]  # Transformers is not needed to check types
    """Preconditions the gradients of every step of ``Trainer.train`` with K-FAC.

    Args:
        max_grad_norm: clips the preconditioned gradients; give ``TrainingArguments(max_grad_norm=0)`` beside it.
        loss_terms: None for a loss that is the mean over examples; "labels" for one that is the mean over all labels
            but -100, as of language models; or as in ``kaisa.KFACPreconditioner``.
        resume_from: the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` takes, where that does not lie
            in the ``output_dir``: callbacks are not told.
        options: those of ``kaisa.KFACPreconditioner``; accumulation and loss scale are the Trainer's.

    Attributes:
        kfac: the preconditioner, from ``on_train_begin`` on; None before.

    Raises:
        ConfigurationError: when training begins: the Trainer clips or shards, or the loss has other terms than said.
        StateError: the checkpoint has no state of K-FAC.
    """

    def __init__(
        self,
        *,
        max_grad_norm: float | None = None,
        loss_terms: Any = None,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.kfac: kaisa.KFACPreconditioner | None = None
        self._max_grad_norm = max_grad_norm
        self._loss_terms = loss_terms
        self._resume_from = resume_from
        self._options = options
        self._micro_batches = 1
        self._labels: float | Tensor = 1.0
        self._parameters: list[nn.Parameter] = []
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check(args)
        self._close()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        planned = args.gradient_accumulation_steps
        of_trainer = {
            "accumulation_steps": planned,
            "grad_scaler": MicroBatches(getattr(optimizer, "scaler", None), planned, lambda: self._micro_batches),
            "loss_terms": self._count if self._loss_terms == LABELS else self._loss_terms,
        }
        plain = getattr(optimizer, "optimizer", optimizer)
        self.kfac = kaisa.KFACPreconditioner(model, plain, **{**of_trainer, **self._options})
        self._parameters = list(model.parameters())
        ranks = args.world_size if args.average_tokens_across_devices else 1

        def note_labels(module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                self._note_labels(keywords, ranks)

        self._hook = model.register_forward_pre_hook(note_labels, with_kwargs=True)
        if state.global_step > 0:
            checkpoint.load(self._saved(args, state), self.kfac)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batches = _micro_batches(args, state, kwargs["train_dataloader"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.kfac is not None
        self.kfac.step()
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.kfac is not None and not args.save_only_model and not state.is_hyper_param_search:
            checkpoint.save(_checkpoint(args, state) / _FOLDER, self.kfac, keep=1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _note_labels(self, keywords: dict[str, Any], ranks: int) -> None:
        """Notes how many terms the loss of a micro-batch has, and refuses what was not told of."""
        labels, items = keywords.get("labels"), keywords.get("num_items_in_batch")
        if self._loss_terms is None and labels is not None and labels.ndim > 1 and not labels.is_floating_point():
            raise ConfigurationError(
                f"the labels have the shape {tuple(labels.shape)}, so that the loss is a mean over more than examples; "
                "give KFACCallback(loss_terms='labels'), or how many terms it has"
            )
        if self._loss_terms == LABELS:
            if labels is None:
                raise ConfigurationError("loss_terms='labels', but the model gets none; give loss_terms as a number")
            # The Trainer divides the sum over all micro-batches by items, or each mean by their number.
            own = labels.ne(_NO_LABEL).sum() if items is None else items / (self._micro_batches * ranks)
            self._labels = own

    def _count(self, step: int) -> float:
        """Returns the terms of a micro-batch, read on the host once, and only on steps that update factors."""
        self._labels = max(1.0, float(self._labels))
        return self._labels

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Returns the folder of K-FAC in the checkpoint that the Trainer goes on from."""
        chosen = _checkpoint(args, state) if self._resume_from is None else Path(self._resume_from)
        folder = chosen / _FOLDER / f"step_{state.global_step:08d}"
        if not folder.is_dir() or not _is_of(chosen, state):
            raise StateError(
                f"{chosen} does not hold K-FAC at step {state.global_step} of this run; it was written without, or the "
                "Trainer goes on from another folder: give that as KFACCallback(resume_from=...)"
            )
        return folder

    def _close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self.kfac is not None:
            self.kfac.close()


def _check(args: TrainingArguments) -> None:
    if args.max_grad_norm and args.max_grad_norm > 0:
        raise ConfigurationError(
            f"the Trainer would clip at {args.max_grad_norm} before K-FAC; give TrainingArguments(max_grad_norm=0) and "
            f"KFACCallback(max_grad_norm={args.max_grad_norm}), which clips after it, or without for no clipping"
        )
    if args.deepspeed or args.fsdp or args.n_gpu > 1:
        raise ConfigurationError(
            "K-FAC needs whole parameters on every rank: one device a process, without FSDP and DeepSpeed; "
            "start one process for each GPU with torchrun"
        )


def _micro_batches(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Returns how many micro-batches the coming step takes: fewer at the end of an epoch."""
    planned: int = args.gradient_accumulation_steps
    if not hasattr(loader, "__len__"):
        return planned
    done = state.global_step % math.ceil(len(loader) / planned)
    return min(planned, len(loader) - int(done) * planned)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of(path: Path, state: TrainerState) -> bool:
    """Says whether the Trainer's state came from a checkpoint: what was logged until then tells runs apart."""
    found = TrainerState.load_from_json(str(path / "trainer_state.json"))
    logged: bool = found.log_history == state.log_history
    return logged
