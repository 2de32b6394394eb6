"""Dense Fisher matrices by looping over examples and over what the model may predict.

The Fisher of one example is E[∇ℓ ∇ℓᵀ], the expectation taken over the true target (empirical) or
over the model's own predictive distribution (exact). A matrix here is the mean over examples;
parameters are flattened and put end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of one loss as a vector, zero where the loss does not depend on it."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def per_example_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[Tensor],
) -> Tensor:
    """Return (examples, parameters): the gradient of each example's own loss."""
    rows = []
    for index in range(len(inputs)):
        one = slice(index, index + 1)
        rows.append(flat_gradient(loss(model(inputs[one]), targets[one]), parameters))
    return torch.stack(rows)


def empirical_fisher(gradients: Tensor) -> Tensor:
    """Return the mean over examples of g gᵀ."""
    return torch.stack([torch.outer(row, row) for row in gradients]).mean(0)


def exact_fisher(model: nn.Module, inputs: Tensor, parameters: Sequence[Tensor], kind: str) -> Tensor:
    """Return the mean over examples of E[g gᵀ] over the model's predictive distribution.

    Args:
        model: what maps a batch of inputs to outputs (batch, ..., dimension).
        inputs: the batch.
        parameters: the parameters whose Fisher is wanted.
        kind: "categorical" (softmax cross-entropy), "gaussian" (ℓ = ½‖y − f‖²) or "bernoulli"
            (binary cross-entropy on logits); positions between batch and dimension are independent
            predictions and add up.
    """
    total = None
    for index in range(len(inputs)):
        for score in predicted_scores(model(inputs[index : index + 1]), kind):
            row = flat_gradient(score, parameters)
            total = torch.outer(row, row) if total is None else total + torch.outer(row, row)
    return total / len(inputs)


def predicted_scores(outputs: Tensor, kind: str) -> Iterator[Tensor]:
    """Yield scalars whose gradients' outer products add up to the exact Fisher.

    For a class c of probability p that is √p · (−log p), the root held constant: its square weighs
    the outer product by the probability with which the class would have been drawn.
    """
    for prediction in outputs.reshape(-1, outputs.shape[-1]):
        for index in range(len(prediction)):
            yield _score(prediction, index, kind)


def _score(prediction: Tensor, index: int, kind: str) -> Tensor:
    if kind == "categorical":
        surprise = F.log_softmax(prediction, dim=-1)[index]
        return surprise * surprise.detach().exp().sqrt()
    if kind == "bernoulli":
        probability = prediction[index].detach().sigmoid()
        return prediction[index] * (probability * (1 - probability)).sqrt()
    assert kind == "gaussian"
    return prediction[index]


def batched_scores(outputs: Tensor, kind: str) -> Iterator[Tensor]:
    """Yield one scalar for each thing that may be predicted, summed over examples and positions.

    As examples do not meet in the model, the output gradients of one such scalar are those of
    `predicted_scores`, example by example.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    for index in range(rows.shape[-1]):
        yield torch.stack([_score(row, index, kind) for row in rows]).sum()
