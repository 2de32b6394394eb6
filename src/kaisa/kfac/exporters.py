"""Factors for other libraries, so that nobody computes them twice.

    to_laplace       a state of laplace-torch 0.3's KronLaplace: posteriors, marginal likelihood
    to_kronfluence   the covariance files of kronfluence 1.0.1: influence functions
    to_curvlinops    a state of curvlinops 3.0.1's KFACLinearOperator: products, inverses, traces

They take means over a data set (`kaisa.kfac.mean_factors`), whose label says over how many examples N. Nothing of these
libraries is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from kaisa.errors import ConfigurationError
from kaisa.kfac.factors import Factors, Pair

_LAYERS = (nn.Linear, nn.Conv2d)  # what these libraries know factors of


def to_laplace(
    factors: Factors,
    model: nn.Module,
    *,
    loss: float,
    outputs: int,
    precision: float = 1.0,
    likelihood: str = "classification",
) -> dict[str, Any]:
    """Returns the state that ``KronLaplace(model, likelihood).load_state_dict`` takes in place of ``fit``.

    laplace-torch treats weight and bias as two blocks: what is between them is lost there, unlike in
    `kaisa.assure.evidence.Posterior`.

    Args:
        factors: of a sampled or exact Fisher; of every trainable parameter.
        model: with the weights that the factors are of.
        loss: of the training data, summed.
        outputs: how many the model has.
        precision: of the prior.
        likelihood: "classification" or "regression".

    Raises:
        ConfigurationError: factors of the empirical Fisher or no means, or parameters without factors.
    """
    examples = _examples(factors)
    if factors.label.fisher == "empirical":
        raise ConfigurationError('Laplace needs the Fisher of the model; make the factors with fisher="categorical"')
    blocks: list[list[Tensor]] = []
    covered: set[str] = set()
    for name, module, pair in _matched(factors, model):
        g = examples * pair.g
        has_bias = module.bias is not None
        blocks.append([g, pair.a[:-1, :-1] if has_bias else pair.a])
        blocks.extend([[g]] if has_bias else [])
        covered |= {f"{name}.{part}".lstrip(".") for part, _ in module.named_parameters(recurse=False)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if missing := [name for name in trained if name not in covered]:
        raise ConfigurationError(
            f"{', '.join(missing[:3])} have no factors, and laplace-torch needs those of every trainable parameter; "
            "freeze them by requires_grad_(False)"
        )
    return {
        "mean": parameters_to_vector([p for p in model.parameters() if p.requires_grad]).detach(),
        "H": blocks,
        "loss": loss,
        "prior_mean": 0.0,
        "prior_precision": torch.tensor([precision]),
        "sigma_noise": torch.tensor(1.0),
        "n_data": examples,
        "n_outputs": outputs,
        "likelihood": likelihood,
        "temperature": 1.0,
        "enable_backprop": False,
        "cls_name": "KronLaplace",
    }


def to_kronfluence(factors: Factors, model: nn.Module, folder: str | Path) -> None:
    """Writes the files that kronfluence's ``perform_eigendecomposition`` and scores go on from.

    Args:
        factors: what to write.
        model: whose layers they are of.
        folder: ``analyzer.factors_output_dir(name)`` of an analysis; made where it is absent.

    Raises:
        ConfigurationError: the factors are no means, or none is of a linear layer or a convolution.
    """
    examples = _examples(factors)
    found = _matched(factors, model)
    counts = {name: torch.tensor([examples], dtype=torch.int64) for name, _, _ in found}
    files = {
        "activation_covariance": {name: (examples * pair.a).contiguous() for name, _, pair in found},
        "gradient_covariance": {name: (examples * pair.g).contiguous() for name, _, pair in found},
        "num_activation_covariance_processed": counts,
        "num_gradient_covariance_processed": counts,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, target / f"{name}.safetensors")


def to_curvlinops(factors: Factors, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state of curvlinops' ``KFACLinearOperator`` with these factors in place of its own.

    Args:
        factors: what to put in.
        model: whose layers they are of; its weights enter the state too, for the operator would overwrite them.
        state: ``operator.state_dict()`` of an operator of the same layers with ``separate_weight_and_bias=False``; it
            need not have computed factors.

    Raises:
        ConfigurationError: a layer of the operator has no factors, or weight and bias are apart in it.
    """
    if state.get("separate_weight_and_bias", False):
        raise ConfigurationError("these factors join weight and bias; make the operator separate_weight_and_bias=False")
    found = {name: pair for name, _, pair in _matched(factors, model)}
    names = sorted({*state["input_covariances"], *state["gradient_covariances"]}) or list(found)
    if missing := [name for name in names if name not in found]:
        raise ConfigurationError(f"there are no factors of {', '.join(missing[:3])}, which the operator has")
    terms = _examples(factors) if state["loss_reduction"] == "sum" else 1
    return {
        **state,
        "model_func_state_dict": {name: value.clone() for name, value in model.state_dict().items()},
        "input_covariances": {name: found[name].a.clone() for name in names},
        "gradient_covariances": {name: terms * found[name].g for name in names},
        **dict.fromkeys(("trace", "det", "logdet", "frobenius_norm")),  # of the old factors
    }


def _examples(factors: Factors) -> int:
    if factors.label.average != "mean" or factors.label.examples < 1:
        raise ConfigurationError("running averages are of no one set of weights; make the factors by mean_factors")
    return factors.label.examples


def _matched(factors: Factors, model: nn.Module) -> list[tuple[str, Any, Pair]]:
    """Returns name, module and pair of the layers that other libraries know, in the order of the parameters."""
    modules = dict(model.named_modules())
    found = [
        (name, modules[name], factors[name])
        for name in modules
        if name in factors and isinstance(modules[name], _LAYERS) and factors[name].a.ndim == factors[name].g.ndim == 2
    ]
    if not found:
        raise ConfigurationError("none of the factors is of a linear layer or a convolution of one group")
    return found
